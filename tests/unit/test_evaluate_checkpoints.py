"""Evaluation of checkpoints on disk, judged by transformers itself and by loops written by hand."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_quant.ckpt.read import QuantizedCheckpoint
from megatron_quant.errors import CheckpointError, QuantError
from megatron_quant.evaluation import Text, decoded, evaluate, load, native, read_windows
from megatron_quant.evaluation.activations import Activations, QuantizedInputs, linear_weights
from megatron_quant.formats import amax, decode, encode, fake_quant, get_format, tensor_scale
from tests.dist import checkpoints
from tests.unit import sources

ALGORITHMS = {"NVFP4": "nvfp4", "FP8": "fp8"}
SUFFIX = {
    "elements": "weight",
    "scale": "weight_scale",
    "block_scale": "weight_scale",
    "tensor_scale": "weight_scale_2",
}
SHAPE = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def save(model, directory: Path) -> Path:
    """A checkpoint of bf16 weights whose tokenizer maps bytes to ids."""
    model.to(torch.bfloat16).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(directory)
    return directory


def wide(model):
    """Weights large enough that rounding them moves the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def quantize(source: Path, directory: Path, algorithm: str) -> Path:
    """A modelopt checkpoint of every linear but router and lm_head, written here by hand."""
    fmt = get_format(ALGORITHMS[algorithm])
    tensors, ignored = {}, []
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if tensor.ndim < 2 or module.endswith(("lm_head", "embed_tokens", "mlp.gate")):
            tensors[name] = tensor
            ignored += [module] if tensor.ndim == 2 else []
            continue
        for field, value in encode(tensor, fmt, tensor_scale(amax(tensor), fmt)).items():
            tensors[f"{module}.{SUFFIX[field]}"] = value
        tensors[f"{module}.input_scale"] = torch.tensor(INPUT_SCALE[algorithm])
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": ignored,
        "producer": {"name": "modelopt", "version": "0.47.0"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    for file in source.glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


INPUT_SCALE = {"NVFP4": 4.0 / (6 * 448), "FP8": 4.0 / 448}


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = wide(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **MOE)))
    return save(model, tmp_path_factory.mktemp("moe") / "bf16")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(Path(__file__).read_text()[:800], encoding="utf-8")
    return file


@pytest.fixture(scope="module", params=list(ALGORITHMS))
def quantized(request, moe, tmp_path_factory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("quantized") / request.param
    return request.param, quantize(moe, out, request.param)


def model_of(directory: Path):
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    )


@torch.no_grad()
def test_perplexity_of_bf16_equals_transformers_own_loss(moe, text):
    result = evaluate(moe, Text(text, 64), dtype=torch.float32)
    model, cut = model_of(moe), torch.stack(read_windows(moe, Text(text, 64)))
    logits = model(cut[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), cut[:, 1:].flatten())
    assert result.perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
    assert result.tokens == cut[:, 1:].numel()
    assert result.kl is None


def test_kl_of_a_checkpoint_to_itself_is_zero(moe, text):
    assert evaluate(moe, Text(text, 64), against=moe).kl == 0


def test_a_quantized_checkpoint_moves_away_from_its_source(quantized, moe, text):
    _, directory = quantized
    result = evaluate(directory, Text(text, 64), against=moe, dtype=torch.float32)
    assert 1e-4 < result.kl < 1


def test_max_tokens_cuts_the_text(moe, text):
    assert evaluate(moe, Text(text, 64, 128)).tokens == 128


def test_native_reads_bf16_as_decoded_does(moe, text):
    ids = read_windows(moe, Text(text, 64))[0]
    ours, theirs = decoded(moe, torch.float32)(ids), native(moe, torch.float32)(ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def by_hand(x_TK, block, tensors, fmt, dscale):
    """One layer's experts: tensors by Hugging Face name, inputs fake-quantized one by one."""
    scores = torch.softmax(F.linear(x_TK, block.gate.weight), dim=-1)
    top, chosen = scores.topk(block.gate.top_k, dim=-1)
    top = top / top.sum(-1, keepdim=True) if block.gate.norm_topk_prob else top
    out = torch.zeros_like(x_TK)
    for token, (weights, experts) in enumerate(zip(top, chosen, strict=True)):
        for weight, expert in zip(weights, experts.tolist(), strict=True):
            w = {p: tensors[f"{expert}.{p}"] for p in ("gate_proj", "up_proj", "down_proj")}
            x = fake_quant(x_TK[token : token + 1], fmt, dscale)
            hidden = F.silu(x @ w["gate_proj"].T) * (x @ w["up_proj"].T)
            out[token] += weight * (fake_quant(hidden, fmt, dscale) @ w["down_proj"].T)[0]
    return out


@torch.no_grad()
def test_every_expert_sees_quantized_inputs(quantized, moe):
    algorithm, directory = quantized
    fmt, dscale = get_format(ALGORITHMS[algorithm]), torch.tensor(INPUT_SCALE[algorithm])
    prefix = "model.layers.1.mlp.experts."
    stored = load_file(directory / "model.safetensors")
    tensors = {}
    for name in stored:
        if name.startswith(prefix) and name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            fields = {f.name: stored[f"{module}.{SUFFIX[f.name]}"] for f in fmt.fields}
            tensors[module.removeprefix(prefix)] = decode(fields, fmt, torch.float32)
    model = model_of(moe)
    block = model.model.layers[1].mlp
    weights = linear_weights(model)
    for e in range(MOE["num_experts"]):
        parts = [tensors[f"{e}.gate_proj"], tensors[f"{e}.up_proj"]]
        weights[f"{prefix}{e}.up_proj"].copy_(torch.cat(parts))
        weights[f"{prefix}{e}.down_proj"].copy_(tensors[f"{e}.down_proj"])
    inputs = {prefix + name: Activations(fmt, dscale.item()) for name in tensors}
    x_TK = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    plain = block(x_TK[None])[0]
    with QuantizedInputs(model, inputs) as mode:
        simulated = block(x_TK[None])[0]
    mode.check()
    expected = by_hand(x_TK, block, tensors, fmt, dscale)
    torch.testing.assert_close(simulated, expected, rtol=1e-4, atol=1e-5)
    assert (simulated - plain).abs().max() > 1e-2


@torch.no_grad()
def test_attention_sees_quantized_inputs_and_the_rest_does_not(moe):
    model, fmt = model_of(moe), get_format("fp8")
    q, router = model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.gate
    x_TK = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    inputs = {"model.layers.0.self_attn.q_proj": Activations(fmt, 0.01)}
    rounded = fake_quant(x_TK, fmt, torch.tensor(0.01))
    plain = router(x_TK)[0]
    with QuantizedInputs(model, inputs):
        assert torch.equal(q(x_TK), F.linear(rounded, q.weight))
        assert torch.equal(router(x_TK)[0], plain)


def test_a_linear_that_is_never_called_is_noticed(moe):
    inputs = {"model.layers.0.self_attn.q_proj": Activations(get_format("fp8"), 0.01)}
    mode = QuantizedInputs(model_of(moe), inputs)
    with pytest.raises(AssertionError, match=r"layers\.0\.self_attn\.q_proj"):
        mode.check()


def test_linear_weights_follow_transformers_names(moe):
    names = {
        n.removesuffix(".weight")
        for n, t in load_file(moe / "model.safetensors").items()
        if t.ndim == 2
    }
    assert set(linear_weights(model_of(moe))) == names


def test_linear_weights_of_mixtral_are_views_of_the_fused_parameters():
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4))
    experts, prefix = model.model.layers[1].mlp.experts, "model.layers.1.block_sparse_moe.experts."
    weights = linear_weights(model)
    for e in range(4):
        fused, down = experts.gate_up_proj[e], experts.down_proj[e]
        assert weights[f"{prefix}{e}.w1"].data_ptr() == fused.data_ptr()
        assert weights[f"{prefix}{e}.w3"].data_ptr() == fused.data_ptr()
        assert weights[f"{prefix}{e}.w2"].data_ptr() == down.data_ptr()


@torch.no_grad()
def test_tied_embeddings_need_no_lm_head(tmp_path, text):
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE, tie_word_embeddings=True)
    directory = save(Qwen3ForCausalLM(config), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    ids = read_windows(directory, Text(text, 64))[0]
    expected = model_of(directory)(ids[None]).logits[0]
    torch.testing.assert_close(decoded(directory, torch.float32)(ids), expected)


def test_fused_members_with_two_formats_are_refused(moe):
    prefix = "model.layers.0.mlp.experts.0."
    inputs = {
        f"{prefix}gate_proj": Activations(get_format("fp8"), 0.01),
        f"{prefix}up_proj": Activations(get_format("nvfp4"), 0.01),
    }
    with pytest.raises(CheckpointError, match=r"experts\.0\.up_proj: its input is nvfp4, but fp8"):
        QuantizedInputs(model_of(moe), inputs)


def test_a_missing_tensor_is_named(moe, text, tmp_path):
    directory = quantize(moe, tmp_path / "out", "FP8")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys: model\.norm\.weight"):
        evaluate(directory, Text(text, 64))


def test_a_reference_with_another_vocabulary_is_refused(moe, text, tmp_path):
    config = Qwen3Config(**{**SHAPE, "vocab_size": 300})
    other = save(Qwen3ForCausalLM(config), tmp_path / "other")
    with pytest.raises(CheckpointError, match="vocabulary has 257 tokens, the reference's 300"):
        evaluate(moe, Text(text, 64), against=other)


def test_a_routers_bias_stays_in_fp32(tmp_path):
    """As engines and transformers keep it: rounded, it sends tokens to other experts."""
    source = checkpoints.save("deepseek_v3", tmp_path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"

    def change(found):
        found[name] = torch.randn(found[name].shape, generator=torch.Generator().manual_seed(1))

    sources.edit(source, change)
    model = load._dense(QuantizedCheckpoint(source), source, torch.bfloat16)
    assert torch.equal(model.state_dict()[name], sources.tensors(source)[name])
    assert model.lm_head.weight.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not a readable UTF-8 text file"), (b"\xff\xfe", "UTF-8"), (b"short", "do not fill")],
)
def test_texts_that_cannot_be_used_are_named(moe, tmp_path, content, message):
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(QuantError, match=rf"bad\.txt: .*{message}"):
        evaluate(moe, Text(file, 64))


def test_a_directory_without_a_tokenizer_is_named(text, tmp_path):
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="bare: no tokenizer"):
        evaluate(tmp_path / "bare", Text(text, 64))


def test_native_says_what_transformers_cannot_read(text, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: transformers cannot read it"):
        native(tmp_path / "empty", torch.float32)
