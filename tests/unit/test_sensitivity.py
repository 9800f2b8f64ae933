"""What each family loses alone: by hand, on ranks, and from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import megatron_quant as mq
from megatron_quant.cli.main import main
from megatron_quant.dist import Groups
from megatron_quant.errors import CalibrationError, QuantError
from megatron_quant.formats import fake_quant, get_format, tensor_scale
from tests.dist import checkpoints
from tests.unit.report_pages import read, rows
from tests.unit.search_world import whole_model

TEXT = Path(__file__)
DATA = mq.Calibration(
    dataset=str(TEXT), size=4, seq_length=16, batch_size=2, cold_experts="layer-max"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return checkpoints.save("qwen2_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def found(source: Path) -> mq.Sensitivity:
    return mq.sensitivity(source, "w4a16_nvfp4,fp8", calibration=DATA, groups=Groups())


def table(found: mq.Sensitivity) -> dict[tuple[str, str], float]:
    return {(row.family, row.format): row.kl for row in found.rows}


def samples(source: Path) -> torch.Tensor:
    from megatron_quant.runs.batches import calibration_batches

    return torch.cat(calibration_batches(DATA, source, 258))


def divergence(model: Any, ids: torch.Tensor, before: torch.Tensor) -> float:
    with torch.no_grad():
        after = F.log_softmax(model(ids).logits.float(), -1)
    return ((before.exp() * (before - after)).sum() / ids.numel()).item()


def test_every_family_is_measured_in_every_format(found: mq.Sensitivity) -> None:
    families = ["attention", "experts", "shared experts", "lm_head", "first layer", "last layer"]
    wanted = {(f, r) for f in (*families, "everything") for r in ("w4a16_nvfp4", "fp8")}
    assert table(found).keys() == wanted | {("KV cache", "fp8"), ("KV cache", "fp8_cast")}
    assert all(row.kl > 0 for row in found.rows)
    assert found.tokens == 64 and found.left_out == ()
    by_name = {(row.family, row.format): row for row in found.rows}
    layers = [by_name[f, "fp8"].weights for f in ("first layer", "last layer", "lm_head")]
    assert sum(layers) == by_name["everything", "fp8"].weights
    assert 8 <= by_name["experts", "fp8"].bits < 8.01
    assert 4.5 <= by_name["experts", "w4a16_nvfp4"].bits < 4.51
    assert max(found.rows, key=lambda row: row.kl).format == "w4a16_nvfp4"


def test_a_family_is_rounded_alone(source: Path, found: mq.Sensitivity) -> None:
    """All attention in weight-only NVFP4, by hand."""
    model, ids = whole_model(source), samples(source)
    fmt = get_format("nvfp4")
    with torch.no_grad():
        before = F.log_softmax(model(ids).logits.float(), -1)
        for layer in model.model.layers:
            attention = layer.self_attn
            fused = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            largest = torch.stack([w.abs().max() for w in fused]).max().float()
            for w, amax in [*((w, largest) for w in fused), (attention.o_proj.weight, None)]:
                scale = tensor_scale(w.abs().max().float() if amax is None else amax, fmt)
                w.copy_(fake_quant(w, fmt, scale))
    wanted = divergence(model, ids, before)
    assert table(found)["attention", "w4a16_nvfp4"] == pytest.approx(wanted, rel=1e-3)


def test_the_kv_cache_is_rounded_alone(source: Path, found: mq.Sensitivity) -> None:
    """Keys after their rotation, and values, cast to FP8."""
    model, ids = whole_model(source), samples(source)
    own = F.scaled_dot_product_attention

    def cast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        k, v = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (k, v))
        return own(q, k, v, **options)

    with torch.no_grad():
        before = F.log_softmax(model(ids).logits.float(), -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", cast)
        wanted = divergence(model, ids, before)
    assert wanted > 0
    assert table(found)["KV cache", "fp8_cast"] == pytest.approx(wanted, rel=0.02)


def on_ranks(source: Path) -> mq.Sensitivity:
    return mq.sensitivity(source, "w4a16_nvfp4,fp8", calibration=DATA)


def test_ranks_share_the_samples(source: Path, found: mq.Sensitivity, ranks: Any) -> None:
    first, second = ranks(2, on_ranks, source)
    assert first == second and first.tokens == found.tokens
    assert table(first) == pytest.approx(table(found), rel=1e-9)


def test_the_command_prints_a_table_and_writes_json(
    source: Path, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "s.json"
    flags = ["--formats", "fp8", "--calib-dataset", str(TEXT), "--calib-size", "4"]
    report = tmp_path / "r.html"
    sizes = ["--calib-seq-length", "16", "--calib-batch-size", "2", "--json", str(path)]
    sizes += ["--report", str(report)]
    assert main(["sensitivity", "--hf-model-id", str(source), *flags, *sizes]) == 0
    printed = capsys.readouterr().out
    document = json.loads(path.read_text())
    assert document["version"] == 1 and document["tokens"] == 64
    for row in document["rows"]:
        assert row["family"] in printed and f"{row['kl']:.5f}" in printed
    facts = json.loads(report.with_suffix(".json").read_text())
    assert facts["sensitivity"] == document
    drawn = rows(read(report.read_text()).one("families"))
    assert [r[:2] for r in drawn] == [[row["family"], row["format"]] for row in document["rows"]]


def test_latent_attention_caches_what_no_engine_scales(tmp_path: Path) -> None:
    latent = checkpoints.save("deepseek_v3", tmp_path, num_hidden_layers=2)
    found = mq.sensitivity(latent, "fp8", calibration=DATA, groups=Groups())
    assert {"attention", "experts", "shared experts", "mlp"} <= {row.family for row in found.rows}
    assert found.left_out == ("KV cache: the model caches no keys and values as they are",)


def test_refused(source: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(QuantError, match="unknown quantization config 'nvfp5'"):
        mq.sensitivity(source, "nvfp5", calibration=DATA, groups=Groups())
    with pytest.raises(QuantError, match="names no recipe"):
        mq.sensitivity(source, "none", calibration=DATA, groups=Groups())
    file = str(tmp_path / "a" / "b")
    assert main(["sensitivity", "--hf-model-id", str(source), "--json", file]) == 1
    assert "is in a directory that does not exist" in capsys.readouterr().err


def test_a_divergence_that_is_not_finite(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = checkpoints.save("qwen3", tmp_path)
    (file,) = broken.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=r"the divergence is nan with attention in") as error:
        mq.sensitivity(broken, "w4a16_nvfp4", calibration=DATA, groups=Groups())
    assert "\n" not in str(error.value)
