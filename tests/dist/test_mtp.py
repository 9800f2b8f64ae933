"""Layers for speculation: loaded into Megatron's ``mtp``, quantized, exported as they came."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_quant.models import lookup
import megatron_quant as mq
from megatron_quant.models import Pipeline
from megatron_quant.recipes.parse import parse_recipe
from tests.dist import checkpoints, drafts, saved
from tests.dist.pool import Ranks
from tests.dist.test_family_exports import LAYOUTS, SIZES
from tests.dist.test_layouts import digests, folder, same_bytes, tensors
from tests.dist.test_mixtures import export_all
from tests.dist.test_stream import stream_all, stream_case
from tests.unit import tiny

IDS = (torch.arange(2 * 15) * 7 % 50).view(2, 15)
# (model, key of config.json, whether files have copies of the embedding and the output layer)
MODELS = [
    ("deepseek_v3", "num_nextn_predict_layers", True),
    ("glm4_moe", "num_nextn_predict_layers", True),
    ("glm4_moe_lite", "num_nextn_predict_layers", False),
    ("qwen3_next", None, False),
]


def live(
    path: Path, tp: int, ep: int, dtype: torch.dtype, pipeline: Pipeline = Pipeline(), mtp: int = 1
) -> Any:
    """The model with its layer for speculation, or without."""
    import torch.distributed as dist

    from megatron_quant.ckpt.plan.ranks import Layout
    from megatron_quant.ckpt.read.open import open_source
    from megatron_quant.mcore.model.load import empty_model, fill_model
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.models import lookup, num_experts, num_layers

    checkpoint = open_source(path)
    architecture = lookup(checkpoint.config)
    params = architecture.params(checkpoint.config)
    stages = pipeline.stages(num_layers(params))
    layout = Layout.simulate(dist.get_world_size(), tp, ep, 1, num_experts(params), stages)
    groups = start_distributed()
    model = empty_model(architecture, checkpoint.config, layout, groups, dtype, mtp)
    fill_model(model, checkpoint)
    return model


def live_logits(path: Path, tp: int, ep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits, and those of its layer for speculation, on every rank."""
    from megatron_quant.ckpt.storage import read_config
    from megatron_quant.mcore.model.schedule import full_logits, whole
    from megatron_quant.models import text_config

    model = live(path, tp, ep, torch.float32)
    chunk, seen, vocab = model.module, [], text_config(read_config(path))["vocab_size"]
    chunk.mtp.register_forward_hook(lambda module, args, found: seen.append(found.chunk(2)[1]))
    with torch.no_grad():
        own = full_logits(chunk, IDS, vocab)
        predicted, _ = chunk.output_layer(seen[0])
        return own.clone(), whole(predicted.transpose(0, 1), vocab)[:, :15].clone()


def reference_logits(name: str, source: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by transformers and arXiv 2412.19437, (21) to (23): one more layer as the block."""
    config, tensors = tiny.config(name), load_file(source / "model.safetensors")
    layers = config["num_hidden_layers"]
    more: dict[str, Any] = {"num_hidden_layers": layers + 1}
    if "mlp_layer_types" in config:
        more["mlp_layer_types"] = [*config["mlp_layer_types"], "sparse"]
    if "layer_types" in config:
        more["layer_types"] = [*config["layer_types"], "full_attention"]
    kind, settings = tiny.MODELS[name]
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**settings, **more})).float()
    state = {n.replace("mtp.layers.0.", f"model.layers.{layers}."): t for n, t in tensors.items()}
    missing, _ = model.load_state_dict(stacked(model, state), strict=False)
    assert not missing
    inner, model = model.model, model.eval()
    seen: list[tuple[Any, Any]] = []
    block = inner.layers[layers]
    inner.layers[layers - 1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    inner.layers = inner.layers[:layers]
    next_ids = torch.cat([IDS[:, 1:], torch.zeros(2, 1, dtype=IDS.dtype)], 1)
    with torch.no_grad():
        hidden = inner(IDS).last_hidden_state
        own = model.lm_head(hidden)
        norms = names(name, layers)
        embedded = norm(inner, tensors[norms["enorm"]], inner.embed_tokens(next_ids))
        both = torch.cat([embedded, norm(inner, tensors[norms["hnorm"]], hidden)], -1)
        into = both @ tensors[norms["eh_proj"]].T
        (args, kwargs) = seen[0]
        out = block(into, *args[1:], **{k: v for k, v in kwargs.items() if k != "hidden_states"})
        out = out[0] if isinstance(out, tuple) else out
        return own, model.lm_head(norm(inner, tensors[norms["norm"]], out))


def stacked(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` with the stacks of experts that transformers keeps in memory."""
    wanted, found = model.state_dict(), dict(state)
    for name in wanted:
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            mlp, kind = name.rsplit(".", 1)
            count = len(wanted[name])
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            found[name] = torch.stack(
                [torch.cat([state[f"{mlp}.{e}.{p}.weight"] for p in parts]) for e in range(count)]
            )
    return found


def norm(inner: Any, weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The model's own norm with another weight."""
    module = type(inner.norm)(len(weight), eps=inner.config.rms_norm_eps)
    module.weight.data.copy_(weight)
    return module(hidden)


def names(model: str, layers: int) -> dict[str, str]:
    layer = f"model.layers.{layers}"
    found = {k: f"{layer}.{k}.weight" for k in ("enorm", "hnorm", "eh_proj")}
    if model != "qwen3_next":
        return found | {"norm": f"{layer}.shared_head.norm.weight"}
    return {
        "enorm": "mtp.pre_fc_norm_embedding.weight",
        "hnorm": "mtp.pre_fc_norm_hidden.weight",
        "eh_proj": "mtp.fc.weight",
        "norm": "mtp.norm.weight",
    }


@pytest.mark.parametrize(("name", "key", "copies"), MODELS)
def test_logits_are_those_of_the_published_formula(
    name: str, key: str | None, copies: bool, tmp_path: Path, ranks: Ranks
) -> None:
    source = drafts.add(tiny.save(name, tmp_path), key, copies)
    expected = reference_logits(name, source)
    for world, tp, ep in ((1, 1, 1), (4, 2, 2)):
        for found in ranks(world, live_logits, source, tp, ep):
            for logits, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


CASES = [
    {"export_quant_cfg": "nvfp4_mse", "expert_scales": "per_expert", "weight_only": True},
    {"export_quant_cfg": "fp8_block", "export_format": "fp8"},
]


@pytest.mark.parametrize(
    ("name", "key", "copies"),
    [MODELS[0], MODELS[-1], ("qwen3_5_moe", "mtp_num_hidden_layers", False)],
)
def test_every_layout_writes_what_a_stream_writes(
    name: str, key: str | None, copies: bool, tmp_path: Path, ranks: Ranks
) -> None:
    made = checkpoints.save(name, tmp_path / "source", **SIZES.get(name, SIZES["kimi_k25"]))
    source = drafts.add(made, key, copies)
    cases = [{**case, "quantize_mtp": True} for case in CASES]
    ranks(1, stream_all, source, tmp_path / "stream", cases)
    for number, flags in enumerate(LAYOUTS):
        ranks(4, export_all, source, tmp_path / str(number), flags, cases)
        for case in cases:
            expected = digests(tmp_path / "stream" / folder(case))
            assert digests(tmp_path / str(number) / folder(case)) == expected, (flags, case)
    for case in cases:
        found, own = tensors(tmp_path / "stream" / folder(case)), tensors(source)
        assert own.keys() <= found.keys()
        packed = {n for n in own if own[n].dtype != found[n].dtype and is_draft(source, n)}
        assert any("experts.3.down_proj" in n for n in packed) and len(packed) > 12
        assert not any("eh_proj" in n or "norm" in n or ".gate." in n for n in packed)


def is_draft(source: Path, name: str) -> bool:
    layers = read(source / "config.json")["num_hidden_layers"]
    return name.startswith("mtp.") or f".{layers}." in name


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = checkpoints.save("glm4_moe", tmp_path_factory.mktemp("mtp"), **SIZES["glm4_moe"])
    return drafts.add(made)


CALIBRATED = {
    "export_quant_cfg": "nvfp4",
    "quantize_mtp": True,
    "cold_experts": "layer-max",
    "calib_size": 8,
    "calib_seq_length": 32,
    "dtype": "fp32",
}


def calibrate(source: Path, out: Path, flags: dict) -> dict[str, int]:
    """The tokens that each expert's weights saw."""
    outcome = saved.quantize(
        hf_model_id=str(source), export_dir=out / "out", **CALIBRATED, **flags
    )
    return dict(outcome.calibration.tokens)


def load(stored: Path, out: Path) -> None:
    flags = {"hf_model_id": None, "export_quant_cfg": None, "dtype": CALIBRATED["dtype"]}
    saved.quantize(megatron_load_path=stored, export_dir=out, **flags)


def test_calibration_reaches_its_experts(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    """At any layout; from there to torch_dist and back, and to a stream by what was measured."""
    kept = tmp_path / "kept.safetensors"
    (one,) = ranks(1, calibrate, source, tmp_path / "one", {"save_calibration": kept})
    flags = {"tp": 2, "ep": 2, "pp": 2, "megatron_save_path": tmp_path / "saved"}
    four = ranks(4, calibrate, source, tmp_path / "four", flags)
    shared = ranks(2, calibrate, source, tmp_path / "shared", {"cp": 2})
    for tokens in (one, *four, *shared):
        mine = [n for n in tokens if n.startswith("mtp.layers.0.transformer_layer.mlp.experts.")]
        assert len(mine) == 8  # two linears of four experts
        # every token goes to two experts, and the last of a sequence, which has no next one, too
        assert sum(tokens[n] for n in mine) == 2 * 2 * 8 * 32
    want = tensors(tmp_path / "one" / "out")
    scales = [n for n in want if n.endswith("input_scale")]
    assert any("layers.2.mlp.experts.3.down_proj" in n for n in scales)
    for other in ("four", "shared"):
        found = tensors(tmp_path / other / "out")
        for name in scales:
            assert float(found[name]) == pytest.approx(float(want[name]), rel=1e-4), name
    ranks(1, load, tmp_path / "saved", tmp_path / "loaded")
    found, want = (tensors(tmp_path / f) for f in ("loaded", "four/out"))
    assert found.keys() == want.keys()
    assert [n for n in want if not same_bytes(found[n], want[n])] == []
    loaded = {**CALIBRATED, "stream": True, "load_calibration": kept, "max_shard_size": "5GB"}
    (tmp_path / "stream").mkdir()
    stream_case(source, tmp_path / "stream" / "out", loaded)
    assert digests(tmp_path / "stream" / "out") == digests(tmp_path / "one" / "out")


def export_live(source: Path, out: Path, recipes: dict[str, Any]) -> None:
    """A user's model at pp 2, with config.json alone and with the files; and one without ``mtp``."""
    config = read(source / "config.json")
    for name, recipe in recipes.items():
        for kind, hf, mtp in (("config", config, 1), ("files", source, 1), ("carried", source, 0)):
            if mtp or not recipe.allows_mtp:
                model = live(source, 2, 2, torch.bfloat16, Pipeline(size=2), mtp)
                mq.quantize(list(model.chunks), recipe, hf_model=hf)
                mq.export(list(model.chunks), out / f"{name}.{kind}")
    model = live(source, 2, 2, torch.bfloat16, Pipeline(size=2), 0)
    with pytest.raises(mq.QuantError, match="the model has no layers for speculation here"):
        mq.quantize(list(model.chunks), recipes["quantized"], hf_model=source)
    model = live(source, 2, 2, torch.bfloat16, Pipeline(size=2))
    said = "mtp_num_layers=1 .*config.json makes it 2"
    with pytest.raises(mq.QuantError, match=said):
        hf = {**config, "num_nextn_predict_layers": 2}
        mq.quantize(list(model.chunks), recipes["quantized"], hf_model=hf)


def test_a_live_model_has_it(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    """It is exported from there, dense or quantized; copies of the embedding too."""
    rule, rest = {"quantize": ["*mlp*"], "weights": "nvfp4"}, {"exclude": ["*"]}
    recipes = {
        name: parse_recipe(name, {"rules": [{**rule, "allow_mtp": allowed}, rest]})
        for name, allowed in (("dense", False), ("quantized", True))
    }
    ranks(4, export_live, source, tmp_path, recipes)
    for name, kinds in (("dense", ("config", "files", "carried")), ("quantized", ("config", "files"))):
        streamed = tmp_path / f"{name}.stream"
        stream_case(source, streamed, {"export_quant_cfg": recipes[name]})
        want, config = tensors(streamed), read(streamed / "config.json")
        for out in (tmp_path / f"{name}.{kind}" for kind in kinds):
            found = tensors(out)
            assert found.keys() == want.keys(), out
            assert [n for n in want if not same_bytes(found[n], want[n])] == [], out
            assert read(out / "config.json") == config
