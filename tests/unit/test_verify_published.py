"""Published checkpoints that the reader decodes exactly pass ``verify`` too."""

import json
from pathlib import Path

import pytest
import torch

from megatron_quant.ckpt.verify.checkpoint import verify
from tests.dist import packed
from tests.unit import exported

OUT = "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """GPTQ with desc_act, and the same weights decoded."""
    return packed.save(tmp_path_factory.mktemp("gptq"))


def test_gptq_in_activation_order(ordered: tuple[Path, Path]) -> None:
    report = verify(*ordered)
    # Engines fuse q_proj with k_proj, up_proj with gate_proj: other formats there are a fault.
    assert len(report.problems) == 9 and all("fused with it" in p for p in report.problems)
    errors = [t.error for t in report.tensors if t.format]
    assert len(errors) > 20 and max(errors) == 0


def test_an_order_that_the_config_denies(ordered: tuple[Path, Path], tmp_path: Path) -> None:
    directory = copy_of(ordered[0], tmp_path / "denied")
    exported.edit_json(
        directory / "config.json", lambda c: c["quantization_config"].update(desc_act=False)
    )
    denied = [p for p in verify(directory).problems if "fused with it" not in p]
    assert len(denied) == 8
    assert all("down_proj.g_idx: does not fit the shape" in problem for problem in denied)


def copy_of(directory: Path, out: Path) -> Path:
    out.mkdir()
    for file in directory.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.mark.parametrize("group", [0, 99])
def test_compressed_tensors_in_activation_order(tmp_path, weights, group) -> None:
    quant = exported.plan("int4")
    directory = exported.export(tmp_path, "compressed-tensors", quant, weights)
    index = torch.tensor([group, *[0] * 127], dtype=torch.int32)
    exported.edit(directory, lambda t: t.update({f"{OUT}.weight_g_idx": index}))
    (problem,) = verify(directory).problems
    assert "config.json knows no such tensor" in problem

    def order(config: dict) -> None:
        for one in config["quantization_config"]["config_groups"].values():
            one["weights"]["actorder"] = "group"

    exported.edit_json(directory / "config.json", order)
    problems = verify(directory).problems
    assert [p.partition("holds ")[2][:6] for p in problems] == (["99, bu"] if group else [])


def test_fp8_without_a_list_of_exclusions(tmp_path, weights, source) -> None:
    """As DeepSeek publishes it: what is no linear is plain, a plain linear is still told."""
    quant = exported.written_plan("fp8", "fp8_block")
    directory = exported.export(tmp_path, "fp8", quant, weights)
    exported.edit_json(
        directory / "config.json",
        lambda c: c["quantization_config"].pop("modules_to_not_convert"),
    )
    report = verify(directory, source)
    assert report.problems == ()
    plain = {t.name for t in report.tensors if not t.format and t.name.endswith("gate.weight")}
    assert plain == {"model.layers.0.mlp.gate.weight"}

    def decoded(tensors: exported.Tensors) -> None:
        del tensors[f"{OUT}.weight_scale_inv"]
        tensors[f"{OUT}.weight"] = weights[f"{OUT}.weight"]

    exported.edit(directory, decoded)
    (problem,) = verify(directory, source).problems
    assert problem.startswith(f"{OUT}.weight: neither quantized nor in the ignore list")


def test_modelopt_in_config_json_alone(tmp_path, weights, source) -> None:
    directory = exported.export(tmp_path, "modelopt", exported.plan("nvfp4"), weights)
    (directory / "hf_quant_config.json").unlink()
    assert verify(directory, source).problems == ()
    listed = json.dumps({"files": ["config.json", "hf_quant_config.json"]})
    (directory / "megatron_quant_manifest.json").write_text(listed)
    (problem,) = verify(directory, source).problems
    assert problem.startswith("hf_quant_config.json: missing, though megatron_quant_manifest.json")


@pytest.mark.parametrize("choice", ["mxfp8", "mxfp4"])
def test_shared_exponents_in_their_own_dtype(tmp_path, weights, source, choice) -> None:
    quant = exported.plan(choice)
    directory = exported.export(tmp_path, "compressed-tensors", quant, weights)

    def own(tensors: exported.Tensors) -> None:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name] = tensors[name].view(torch.float8_e8m0fnu)

    before = {t.name: t.error for t in verify(directory, source).tensors}
    exported.edit(directory, own)
    report = verify(directory, source)
    assert report.problems == ()
    assert {t.name: t.error for t in report.tensors} == before

    def spoil(tensors: exported.Tensors) -> None:
        tensors[f"{OUT}.weight_scale"].view(torch.uint8)[0, 0] = 255

    exported.edit(directory, spoil)
    (problem,) = verify(directory, source).problems
    nan = f"{OUT}.weight_scale: holds the E8M0 code 255, which is NaN and no scale"
    assert problem == nan

    def as_bytes(tensors: exported.Tensors) -> None:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name] = tensors[name].view(torch.uint8)

    exported.edit(directory, as_bytes)
    assert verify(directory, source).problems == (nan,)
