"""GPT-OSS through a live model: packed sources, calibration, pipelines, Megatron's checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.evaluation.load import decoded
from megatron_quant.formats import decode, encode
from megatron_quant.formats.spec import get_format
from tests.dist import checkpoints, saved
from tests.dist.pool import Ranks
from tests.dist.test_layouts import assert_agree, digests, export_all, folder, tensors
from tests.dist.test_pipeline import CALIBRATED
from tests.dist.test_pipeline import export_all as export_staged
from tests.dist.test_stream import stream_case

WEIGHTS = "model.safetensors"
MXFP4 = get_format("mxfp4")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = checkpoints.save("gpt_oss", tmp_path_factory.mktemp("gpt_oss"))
    (path / "text.txt").write_text("What is read here is text, and nothing else. " * 3)
    return path


def pack(source: Path, out: Path, unpacked: Path) -> None:
    """``source`` as it would be released, in MXFP4, and in bf16 with the values that this has."""
    kept = load_file(source / WEIGHTS)
    plain = dict(kept)
    for name in [n for n in kept if n.endswith(("gate_up_proj", "down_proj"))]:
        w_ENK = kept.pop(name).transpose(1, 2).contiguous()
        stacks = [encode(w_NK, MXFP4, None) for w_NK in w_ENK]
        for suffix, field in (("blocks", "elements"), ("scales", "scale")):
            packed = torch.stack([stack[field] for stack in stacks])
            kept[f"{name}_{suffix}"] = packed.unflatten(-1, (-1, 16)) if field == "elements" else packed
        w_ENK = torch.stack([decode(stack, MXFP4, torch.bfloat16) for stack in stacks])
        plain[name] = w_ENK.transpose(1, 2).contiguous()
    for directory, found, more in (
        (out, kept, {"quantization_config": {"quant_method": "mxfp4"}}),
        (unpacked, plain, {}),
    ):
        shutil.copytree(source, directory)
        save_file(found, directory / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **more}))


def test_a_packed_source_is_what_it_decodes_to(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    pack(source, tmp_path / "packed", tmp_path / "plain")
    cases = [{"export_quant_cfg": "nvfp4", "weight_only": True, "export_format": "modelopt"}]
    ranks(4, export_all, tmp_path / "packed", tmp_path / "a", 2, 2, 1, cases)
    ranks(1, export_all, tmp_path / "plain", tmp_path / "b", 1, 1, 1, cases)
    for name, digest in digests(tmp_path / "a" / folder(cases[0])).items():
        if name.endswith(".safetensors"):
            assert digest == digests(tmp_path / "b" / folder(cases[0]))[name]
    report = verify(tmp_path / "a" / folder(cases[0]), tmp_path / "packed")
    assert not report.problems
    assert all(t.error is not None and t.error < 0.15 for t in report.tensors if t.format)


def test_a_calibrated_export_at_stages_and_shards(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Evaluated as well: fake quant computes with biases, and routes as the engines do."""
    one = ranks(1, export_staged, source, tmp_path / "one", {}, [CALIBRATED], timeout=600)
    flags = {"pp": 2, "tp": 2, "ep": 2}
    four = ranks(4, export_staged, source, tmp_path / "four", flags, [CALIBRATED], timeout=600)
    found, expected = (
        tensors(tmp_path / where / folder(CALIBRATED)) for where in ("four", "one")
    )
    for name in [n for n in expected if n.endswith(("k_scale", "v_scale"))]:
        torch.testing.assert_close(found.pop(name), expected.pop(name), rtol=0.02, atol=0)
    assert_agree(found, expected)
    assert four[-1] == pytest.approx(one[0], rel=0.05)


def test_saved_by_megatron_and_loaded(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    cases = {
        "nvfp4": {"export_quant_cfg": "nvfp4", "weight_only": True, "export_format": "modelopt"},
        "int8": {"export_quant_cfg": "int8", "export_format": "compressed-tensors"},
    }
    ranks(4, saved.quantize_all, source, tmp_path / "first", (2, 2, 1), cases, timeout=600)
    dialects = {name: case["export_format"] for name, case in cases.items()}
    ranks(2, saved.load_all, tmp_path / "first", tmp_path, (1, 2, 1), dialects, timeout=600)
    for name in cases:
        assert digests(tmp_path / name) == digests(tmp_path / "first" / name), name
    keys = saved.tensors(tmp_path / "first" / "int8.saved").keys()
    assert {
        f"decoder.layers.1.{name}"
        for name in (
            "self_attention.core_attention.softmax_offset",
            "mlp.router.bias",
            "mlp.experts.experts.3.linear_fc1.bias_w",
            "mlp.experts.experts.3.linear_fc2.bias",
        )
    } <= keys


def fake_quantized_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    from megatron_quant.mcore.model.schedule import full_logits
    from tests.dist import live

    model = live.load(path, live.Parallelism(2, 2), torch.float32)
    live.with_quantizers(model, "w4a16_nvfp4").calibrate()
    with torch.no_grad():
        return full_logits(model.module, ids, 258).clone()


def test_fake_quant_is_what_transformers_computes_with_the_export(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    stream_case(source, tmp_path / "out", {"export_quant_cfg": "w4a16_nvfp4"})
    ids = torch.arange(40) * 7 % 258
    expected, before = (decoded(d, torch.float32)(ids) for d in (tmp_path / "out", source))
    assert (expected - before).norm() > 0.02 * before.norm()
    for logits in ranks(4, fake_quantized_logits, source, ids[None]):
        torch.testing.assert_close(logits[0], expected, rtol=1e-3, atol=1e-3)


STACKS = {"export_quant_cfg": "gpt_oss", "export_format": "mxfp4"}
"""As engines load the model: one stack of experts a layer."""


def in_memory(source: Path) -> dict[str, torch.Tensor]:
    import megatron_quant as mq
    from tests.dist import live

    model = live.load(source, live.Parallelism(2, 2))
    handle = mq.quantize(model.module, "gpt_oss", hf_model=source)
    return dict(mq.export_tensors(handle, format="mxfp4", max_bytes=20_000))


def test_stacks_are_those_of_one_process(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    cases = [{**STACKS, "weight_only": True}]
    ranks(4, export_all, source, tmp_path / "live", 2, 2, 1, cases)
    stream_case(source, tmp_path / "out", {**STACKS, "max_shard_size": "300KB"})
    found, expected = (
        {n: d for n, d in digests(where).items() if "manifest" not in n}
        for where in (tmp_path / "live" / folder(cases[0]), tmp_path / "out")
    )
    assert found == expected and sum(n.endswith(".safetensors") for n in found) > 1
    whole = tensors(tmp_path / "out")
    for exported in ranks(4, in_memory, source):
        assert exported.keys() == whole.keys()
        assert all(torch.equal(exported[name], w) for name, w in whole.items())


def test_released_scales_are_kept_through_a_live_model(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    pack(source, tmp_path / "packed", tmp_path / "plain")
    cases = [{**STACKS, "weight_only": True, "keep_scales": True}]
    ranks(2, export_all, tmp_path / "packed", tmp_path / "out", 1, 2, 1, cases)
    found, wanted = (tensors(d) for d in (tmp_path / "out" / folder(cases[0]), tmp_path / "packed"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], w) for name, w in wanted.items())
