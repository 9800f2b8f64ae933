"""Layers for speculation: loaded into Megatron's ``mtp``, quantized, exported as they came."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_quant.models import lookup
from tests.dist import checkpoints, drafts
from tests.dist.pool import Ranks
from tests.dist.test_family_exports import LAYOUTS, SIZES
from tests.dist.test_layouts import digests, folder, tensors
from tests.dist.test_mixtures import export_all
from tests.dist.test_stream import stream_all
from tests.unit import tiny

IDS = (torch.arange(2 * 15) * 7 % 50).view(2, 15)
# (model, key of config.json, whether files have copies of the embedding and the output layer)
MODELS = [
    ("deepseek_v3", "num_nextn_predict_layers", True),
    ("glm4_moe", "num_nextn_predict_layers", True),
    ("glm4_moe_lite", "num_nextn_predict_layers", False),
    ("qwen3_next", None, False),
]


def live_logits(path: Path, tp: int, ep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits, and those of its layer for speculation, on every rank."""
    import torch.distributed as dist

    from megatron_quant.ckpt.plan.ranks import Layout
    from megatron_quant.ckpt.read.open import open_source
    from megatron_quant.mcore.model.load import empty_model, fill_model
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.mcore.model.schedule import full_logits, whole
    from megatron_quant.models import lookup, num_experts

    checkpoint = open_source(path)
    architecture, vocab = lookup(checkpoint.config), checkpoint.config["vocab_size"]
    experts = num_experts(architecture.params(checkpoint.config))
    layout = Layout.simulate(dist.get_world_size(), tp, ep, 1, experts)
    groups = start_distributed()
    model = empty_model(architecture, checkpoint.config, layout, groups, torch.float32, mtp=1)
    fill_model(model, checkpoint)
    chunk, seen = model.module, []
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


@pytest.mark.parametrize(("name", "key", "copies"), MODELS)
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
    prefix = "mtp.layers.0" if name == "qwen3_next" else "model.layers.2"
    for case in cases:
        found = tensors(tmp_path / "stream" / folder(case))
        assert f"{prefix}.mlp.experts.3.down_proj.weight_scale" in {
            n.replace("_scale_inv", "_scale") for n in found
        }
        for kept in set(tensors(source)) - set(found):
            raise AssertionError(kept)
