"""Experts measured on more tokens than the router gives them (--calib-experts), live."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_gptq import ONE, run, same

SAMPLES, LENGTH, CHOSEN, EXPERTS = 6, 48, 2, 8
TOKENS = SAMPLES * LENGTH
UP, DOWN = "experts.{}.gate_proj.", "experts.{}.down_proj."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


def measured(
    source: Path, folder: Path, ranks: Ranks, experts: str, layout: dict | None = None
) -> dict[str, torch.Tensor]:
    """What a run keeps."""
    file = folder / f"{experts}.safetensors"
    one = {
        "export_quant_cfg": "int4",
        "algorithm": "gptq",
        "export_dir": folder / f"out-{experts}",
        "calib_size": SAMPLES,
        "dtype": "fp32",
        "save_calibration": file,
        "keep_hessians": True,
        "calib_experts": experts,
        "overwrite": True,
    }
    sizes = layout or ONE
    ranks(4 if layout else 1, run, source, sizes, [one])
    return load_file(file)


@pytest.fixture(scope="module")
def routed(source: Path, tmp_path_factory, ranks: Ranks) -> dict[str, torch.Tensor]:
    return measured(source, tmp_path_factory.mktemp("routed"), ranks, "routed")


def layer(found: dict[str, torch.Tensor], kind: str, what: str) -> torch.Tensor:
    """A statistic of all experts of the first layer."""
    return torch.stack([found[f"model.layers.0.mlp.{kind.format(e)}{what}"] for e in range(8)])


def check_the_rest(found: dict[str, torch.Tensor], routed: dict[str, torch.Tensor]) -> None:
    """No output of a layer has changed: everything else was given the same."""
    rest = [name for name in routed if ".experts." not in name]
    assert len(rest) > 10
    for name in rest:
        assert torch.equal(found[name], routed[name]), name


def test_all_experts_see_all_tokens(
    source: Path, routed: dict[str, torch.Tensor], tmp_path: Path, ranks: Ranks
) -> None:
    found = measured(source, tmp_path, ranks, "all")
    check_the_rest(found, routed)
    assert layer(found, UP, "input_tokens").tolist() == [TOKENS] * EXPERTS
    moments = layer(found, UP, "input_moment")
    pooled = layer(routed, UP, "input_moment").sum(0) / CHOSEN
    for moment in moments:
        torch.testing.assert_close(moment, pooled, rtol=1e-4, atol=1e-4)
    assert (layer(found, DOWN, "input_squares") > layer(routed, DOWN, "input_squares")).any(1).all()


def test_a_share_of_them_sees_a_token(
    source: Path, routed: dict[str, torch.Tensor], tmp_path: Path, ranks: Ranks
) -> None:
    """0.4 of 8 experts are 4: the two of the router and the next two; at another layout too."""
    found = measured(source, tmp_path, ranks, "0.4")
    check_the_rest(found, routed)
    tokens, before = (layer(f, UP, "input_tokens") for f in (found, routed))
    assert tokens.sum() == 4 * TOKENS and before.sum() == CHOSEN * TOKENS
    assert (tokens >= before).all() and tokens.max() < TOKENS
    assert torch.equal(tokens, layer(found, DOWN, "input_tokens"))
    (tmp_path / "four").mkdir()
    layout = {"tp": 2, "ep": 2, "etp": 2}
    same(measured(source, tmp_path / "four", ranks, "0.4", layout), found)


def test_what_is_refused(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    for experts, said in {
        "0": "--calib-experts is 0: give routed, all, or a share",
        "most": "--calib-experts is most: give routed, all, or a share",
        "1.5": "--calib-experts is 1.5: give routed, all, or a share",
    }.items():
        with pytest.raises(Exception, match=said):
            measured(source, tmp_path, ranks, experts)
    without = {"export_quant_cfg": "int4", "algorithm": "max", "calib_experts": "all"}
    (error,) = ranks.errors(1, run, source, ONE, [{**without, "export_dir": tmp_path / "out"}])
    assert "--calib-experts: no expert's inputs are measured; leave it out" in str(error)
    flags = {"export_quant_cfg": "int4", "algorithm": "gptq", "sequential": True}
    (error,) = ranks.errors(1, run, source, ONE, [{**flags, "export_dir": tmp_path / "out"}])
    assert "--sequential goes layer by layer, and a Megatron model runs whole: add" in str(error)
    (error,) = ranks.errors(1, without_a_dispatcher, source, tmp_path)
    assert "the model has moe_token_dispatcher_type='flex'" in str(error)
    assert not (tmp_path / "out").exists()


def without_a_dispatcher(source: Path, out: Path) -> None:
    from megatron_quant import Calibration, quantize
    from megatron_quant.recipes import load_recipe, with_algorithm
    from tests.dist import live

    module = live.load(source).module
    for layer in module.decoder.layers:
        layer.mlp.config.moe_token_dispatcher_type = "flex"
    recipe = with_algorithm(load_recipe("int4"), "imatrix")
    quantize(
        module,
        recipe,
        lambda model: live.forward(model, live.batches(1)[0]),
        hf_model=str(source),
        calibration=Calibration(experts="all"),
    )


def test_a_loaded_calibration_measures_nothing() -> None:
    from megatron_quant.errors import QuantError
    from megatron_quant.runs.settings import Calibration

    with pytest.raises(QuantError, match="--calib-experts says what is measured, but --load-cal"):
        Calibration(experts=0.5, load=Path("kept.safetensors"))
