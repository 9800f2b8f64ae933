"""DeepSeek-V4 in the form of its release: routed experts change, all else keeps its bytes."""

import re
from pathlib import Path

import pytest
import torch

from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify import verify
from megatron_quant.errors import CheckpointError, FormatError, QuantError
from megatron_quant.formats import encode
from megatron_quant.formats.spec import get_format
from tests.dist.checkpoints import tokenizer
from tests.unit import family_models, sources

FORM = {"export_quant_cfg": "deepseek_v4", "export_format": "deepseek-v4", "weight_only": False}
CALIBRATED = {"calib_size": 4, "calib_seq_length": 32, "cold_experts": "layer-max"}
LINEAR = re.compile(
    r"(layers|mtp)\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w\d"
    r"|[eh]_proj)\.weight"
)
EXPERT = re.compile(r"(layers|mtp)\.\d+\.ffn\.experts\.\d+\.w\d\.weight")
E8M0 = torch.float8_e8m0fnu
SAID = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


def release(directory: Path, *, fp8_experts: bool = False) -> Path:
    """A tiny checkpoint as DeepSeek's are, with a layer for speculation.

    Base models have FP8 in experts too, and scales in fp32 that are no powers of two.
    """
    family_models.save("deepseek_v4", directory)
    tokenizer().save_pretrained(directory)
    found = sources.tensors(directory)
    own = {n: w for n, w in found.items() if n.startswith("layers.1.") and "tid2eid" not in n}
    torch.manual_seed(1)
    for name, w in own.items():
        found[name.replace("layers.1", "mtp.0")] = (torch.randn(w.shape) * 0.1).to(w.dtype)
    found["mtp.0.e_proj.weight"] = torch.randn(64, 64).bfloat16()
    for name in list(found):
        module = name.removesuffix(".weight")
        if EXPERT.fullmatch(name) and not fp8_experts:
            fields = encode(found[name].float(), get_format("mxfp4"), None)
            found[name] = fields["elements"].view(torch.int8)
            found[f"{module}.scale"] = fields["scale"].view(E8M0)
        elif LINEAR.fullmatch(name) or EXPERT.fullmatch(name):
            w = found[name].float()
            scale = w.abs().max() / 448
            if not fp8_experts:
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            found[name] = (w / scale).to(torch.float8_e4m3fn)
            blocks = [-(-n // 128) for n in w.shape]
            scales = scale.expand(blocks)
            found[f"{module}.scale"] = scales.clone() if fp8_experts else scales.to(E8M0)
    sources.write(directory, found)
    kind = "fp8" if fp8_experts else "fp4"
    more = {"num_nextn_predict_layers": 1, "expert_dtype": kind, "quantization_config": SAID}
    sources.config(directory, **more)
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("v4")
    release(directory / "source")
    (directory / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    text = {"calib_dataset": str(directory / "text.txt"), **CALIBRATED}
    for name, kept in (("exact", True), ("rounded", False)):
        flags = {**FORM, **text, "serve_engine": "vllm", "keep_scales": kept}
        sources.run(directory / "source", directory / name, **flags)
    return directory


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("out", ["exact", "rounded"])
def test_all_but_routed_experts_keep_their_bytes(out: str, folder: Path) -> None:
    before, after = (sources.tensors(folder / d) for d in ("source", out))
    kept = [n for n in before if ".ffn.experts." not in n]
    assert sum(bool(LINEAR.fullmatch(n)) for n in kept) > 20
    for name in kept:
        assert after[name].dtype == before[name].dtype, name
        assert bits(after[name]) == bits(before[name]), name
    experts = {n for n in before if EXPERT.fullmatch(n)}
    assert len(experts) == 3 * 4 * 3
    names = {f"{n.removesuffix('.weight')}.{s}" for n in experts for s in SUFFIXES}
    assert after.keys() == {*kept, *names}


SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale")


def test_the_config_says_what_vllm_and_sglang_look_for(folder: Path) -> None:
    before, after = (sources.config(folder / d) for d in ("source", "exact"))
    assert after["quantization_config"] == {**SAID, "moe_quant_algo": "NVFP4"}
    rest = [{k: v for k, v in c.items() if k != "quantization_config"} for c in (before, after)]
    assert rest[0] == rest[1]


def test_mxfp4_becomes_nvfp4_with_every_value(folder: Path) -> None:
    """With --keep-scales; layers for speculation, whose experts engines read alike, always."""
    found = {d: QuantizedCheckpoint(folder / d) for d in ("source", "exact", "rounded")}
    moved = 0
    for module in (m for m in found["source"].modules if ".ffn.experts." in m):
        before, exact, rounded = (
            c.weight(f"{module}.weight", torch.float32) for c in found.values()
        )
        assert torch.equal(exact, before), module
        same = torch.equal(rounded, before)
        assert same or not module.startswith("mtp."), module
        moved += not same
    assert moved > 0


def test_gate_and_up_share_scales_and_speculation_has_input_scales(folder: Path) -> None:
    found = sources.tensors(folder / "exact")
    largest: dict[str, float] = {}
    for name in (n for n in found if n.endswith(".input_scale") and n.startswith("layers.")):
        linear = name.split(".")[-2]
        largest[linear] = max(largest.get(linear, 0.0), found[name].item())
    for expert in range(4):
        for layer in ("layers.0", "layers.1", "mtp.0"):
            at = f"{layer}.ffn.experts.{expert}"
            assert found[f"{at}.w1.weight_scale_2"] == found[f"{at}.w3.weight_scale_2"]
        for linear, scale in largest.items():
            assert found[f"mtp.0.ffn.experts.{expert}.{linear}.input_scale"].item() == scale


def test_verify_reads_both_forms(folder: Path) -> None:
    for out, against in (("source", None), ("exact", "source"), ("rounded", "source")):
        report = verify(folder / out, against and folder / against)
        assert not report.problems, report.problems[:2]
        formats = {t.format for t in report.tensors}
        assert formats == {"", "fp8_block", "mxfp4" if out == "source" else "nvfp4"}


@pytest.mark.parametrize("form", ["source", "exact"])
def test_verify_refuses_a_release_that_is_not_whole(
    form: str, folder: Path, tmp_path: Path
) -> None:
    at = "layers.1.ffn.experts"

    def router(found: sources.Tensors) -> None:
        found["layers.1.ffn.gate.weight"] = found["layers.1.ffn.gate.weight"].to(
            torch.float8_e4m3fn
        )
        found["layers.1.ffn.gate.scale"] = torch.ones(1, 1).to(E8M0)

    changes = {
        "expert": lambda found: [found.pop(n) for n in list(found) if f"{at}.1." in n],
        "last": lambda found: [found.pop(n) for n in list(found) if f"{at}.3." in n],
        "turned": lambda found: found.update(
            {f"{at}.0.w1.weight": found[f"{at}.0.w1.weight"].t().contiguous()}
        ),
        "scale": lambda found: [found.pop("layers.0.attn.wq_a.scale")],
        "router": router,
    }
    for what, change in changes.items():
        found = sources.tensors(folder / form)
        change(found)
        (tmp_path / what).mkdir()
        sources.write(tmp_path / what, found)
        (tmp_path / what / "config.json").write_bytes((folder / form / "config.json").read_bytes())
        assert verify(tmp_path / what).problems, what


def test_what_is_no_release_is_refused(folder: Path, tmp_path: Path) -> None:
    plain = family_models.save("deepseek_v4", tmp_path / "plain")
    with pytest.raises(FormatError, match="carries what the release has in FP8"):
        sources.run(plain, tmp_path / "out", **FORM)
    flags = {**FORM, "export_quant_cfg": "mxfp8"}
    with pytest.raises(QuantError, match=r"deepseek-v4 export has no mxfp8.*recipe deepseek_v4"):
        sources.run(folder / "source", tmp_path / "out", **flags)
    sources.config(plain, quantization_config={**SAID, "weight_block_size": [64, 64]})
    with pytest.raises(CheckpointError, match=r"\[64, 64\].* is not read"):
        sources.run(plain, tmp_path / "out", **FORM)


def test_a_release_is_a_source_of_other_formats(folder: Path, tmp_path: Path) -> None:
    flags = {"export_quant_cfg": "w4a16_nvfp4", "export_format": "modelopt"}
    sources.run(folder / "source", tmp_path / "out", **flags)
    assert not verify(tmp_path / "out", folder / "source").problems
    after = sources.tensors(tmp_path / "out")
    assert after["layers.0.attn.wo_a.weight"].dtype == torch.bfloat16
    assert after["layers.0.attn.wq_b.weight"].dtype == torch.uint8


def test_a_base_model_with_fp8_experts(tmp_path: Path) -> None:
    source, out = release(tmp_path / "source", fp8_experts=True), tmp_path / "out"
    assert not verify(source).problems
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    text = {"calib_dataset": str(tmp_path / "text.txt"), **CALIBRATED}
    sources.run(source, out, **{**FORM, **text, "serve_engine": "vllm"})
    assert not verify(out, source).problems

    before, after = sources.tensors(source), sources.tensors(out)
    kept = [n for n in before if ".ffn.experts." not in n or n.startswith("mtp.")]
    assert before["layers.0.attn.wq_a.scale"].dtype == torch.float32
    for name in kept:  # experts for speculation stay in FP8: they would be rounded
        assert after[name].dtype == before[name].dtype, name
        assert bits(after[name]) == bits(before[name]), name
    experts = [n for n in before if EXPERT.fullmatch(n) and n.startswith("layers.")]
    assert {after[n].dtype for n in experts} == {torch.uint8} and len(experts) == 2 * 4 * 3
    assert sources.config(out)["quantization_config"] == {
        **SAID,
        "moe_quant_algo": "NVFP4",
        "ignore": ["mtp.0.ffn.experts*"],
    }
    assert sources.config(out)["expert_dtype"] == "fp8"  # vLLM takes fp32 scales where it says so
    values = [QuantizedCheckpoint(d).weight(experts[0], torch.float32) for d in (source, out)]
    assert 0 < (values[0] - values[1]).norm() / values[0].norm() < 0.15
    flags = {"export_quant_cfg": "w4a16_nvfp4", "export_format": "modelopt"}
    sources.run(source, tmp_path / "other", **flags)
    assert not verify(tmp_path / "other", source).problems
