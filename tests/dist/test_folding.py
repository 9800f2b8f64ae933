"""awq and smoothquant on a live model: equal bytes from one calibration, at every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import megatron_quant as mq
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.folding.fold import DOCUMENT
from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_gptq import LAYOUTS, ONE, PATIENCE_S, flags_of, run, same, stream
from tests.dist.test_layouts import digests


SIZES = {"num_experts": 4, "moe_intermediate_size": 128}
# name -> (recipe, algorithm, dialect)
CASES = {
    "int4": ("int4", "awq", "compressed-tensors"),
    "w4a8": ("w4a8", "awq", "modelopt"),
    "nvfp4": ("nvfp4", "awq", "modelopt"),
    "int8": ("int8", "smoothquant", "compressed-tensors"),
}


def case(name: str, out: Path, **flags: Any) -> dict[str, Any]:
    return flags_of(CASES[name], out / name, **flags)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts, a shared expert with a gate, biases of q, k and v, grouped queries."""
    return checkpoints.save("qwen2_moe", tmp_path_factory.mktemp("moe"), **SIZES)


@pytest.fixture(scope="module")
def measured(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """A folder with what one rank measured, and the exports that it made of it."""
    folder = tmp_path_factory.mktemp("one")
    file = folder / "kept.safetensors"
    first = case("nvfp4", folder, save_calibration=file)
    rest = [case(name, folder, load_calibration=file) for name in CASES if name != "nvfp4"]
    ranks(1, run, source, ONE, [first, *rest], timeout=PATIENCE_S)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_calibration_gives_equal_bytes(
    layout: str, source: Path, measured: Path, tmp_path: Path, ranks: Ranks
) -> None:
    world, sizes = LAYOUTS[layout]
    file = measured / "kept.safetensors"
    runs = [case(name, tmp_path, load_calibration=file) for name in CASES]
    ranks(world, run, source, sizes, runs, timeout=PATIENCE_S)
    for name in CASES:
        assert digests(tmp_path / name) == digests(measured / name), name


def test_a_stream_gives_these_bytes_too(
    source: Path, measured: Path, tmp_path: Path, ranks: Ranks
) -> None:
    file = measured / "kept.safetensors"
    runs = [case(name, tmp_path, load_calibration=file) for name in CASES]
    ranks(2, stream, source, runs, timeout=PATIENCE_S)
    for name in CASES:
        assert digests(tmp_path / name) == digests(measured / name), name
        assert verify(tmp_path / name, source).problems == ()
        document = json.loads((tmp_path / name / DOCUMENT).read_text())
        assert len(document["bf16"]) == 18 and len(document["fp32"]) == 4


def test_norms_within_latent_attention(tmp_path: Path, ranks: Ranks) -> None:
    source, file = checkpoints.save("deepseek_v3", tmp_path / "source"), tmp_path / "kept"
    ranks(1, run, source, ONE, [case("nvfp4", tmp_path / "one", save_calibration=file)])
    loaded = case("nvfp4", tmp_path / "two", load_calibration=file)
    ranks(2, run, source, {"tp": 2}, [loaded])
    ranks(1, stream, source, [{**loaded, "export_dir": tmp_path / "stream"}])
    found = digests(tmp_path / "stream")
    assert found == digests(tmp_path / "one" / "nvfp4") == digests(tmp_path / "two" / "nvfp4")
    vectors = json.loads((tmp_path / "stream" / DOCUMENT).read_text())["bf16"]
    assert {f"model.layers.0.self_attn.{n}_a_layernorm.values" for n in ("q", "kv")} < vectors.keys()


def test_statistics_are_those_of_one_rank(
    source: Path, measured: Path, tmp_path: Path, ranks: Ranks
) -> None:
    file = tmp_path / "kept.safetensors"
    flags = {"save_calibration": file, "dtype": "fp32"}
    ranks(1, run, source, ONE, [case("nvfp4", tmp_path / "a", **flags)])
    found = load_file(file)
    ranks(4, run, source, LAYOUTS["tp2-ep2"][1], [case("nvfp4", tmp_path / "b", **flags)])
    same(load_file(file), found)
    assert any(name.endswith("input_peaks") for name in found)


def from_training(source: Path, folder: Path, file: Path) -> None:
    from tests.dist import plain

    plain.save_run(source, folder / "run", plain.Training(stacked=True))
    run(
        source,
        ONE,
        [case("int4", folder, load_calibration=file, megatron_load_path=folder / "run")],
    )


def test_weights_of_a_training_run(
    source: Path, measured: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """The export is compared with the run's weights, as the factors change them."""
    ranks(1, from_training, source, tmp_path, measured / "kept.safetensors", timeout=PATIENCE_S)
    found, wanted = digests(tmp_path / "int4"), digests(measured / "int4")
    assert all(found[name] == wanted[name] for name in ("model.safetensors", DOCUMENT))


def saved_and_exported(source: Path, out: Path) -> None:
    from tests.dist import live

    two = live.Parallelism(tp=2)
    module = live.load(source, two).module
    calibration = mq.Calibration(load=out / "kept.safetensors", cold_experts="layer-max")
    handle = mq.quantize(module, str(out / "awq.yaml"), hf_model=source, calibration=calibration)
    mq.export(handle, out / "live")
    mq.save(module, out / "saved")
    other = live.load(source, two).module
    restored = mq.restore(other, out / "saved", hf_model=source)
    mq.export(restored, out / "restored")


def test_the_front_door_and_a_restored_model(
    source: Path, measured: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """The weights of a saved model have the factors; its export brings none to compare with."""
    rule = "{quantize: ['*'], weights: nvfp4, inputs: nvfp4, algorithm: awq}"
    (tmp_path / "awq.yaml").write_text(f"rules: [{rule}]\n")
    (tmp_path / "kept.safetensors").symlink_to(measured / "kept.safetensors")
    ranks(2, saved_and_exported, source, tmp_path, timeout=PATIENCE_S)
    weights = "model.safetensors"
    live = digests(tmp_path / "live")
    assert live[weights] == digests(measured / "nvfp4")[weights]
    assert live[DOCUMENT] == digests(measured / "nvfp4")[DOCUMENT]
    restored = digests(tmp_path / "restored")
    assert restored[weights] == live[weights] and DOCUMENT not in restored


def started(source: Path) -> None:
    from megatron_quant.errors import QuantError
    from megatron_quant.mcore.training import prepare
    from tests.dist import live

    with pytest.raises(QuantError, match="changes weights by awq, which needs calibration data"):
        prepare([live.load(source).module], "int4_awq", hf_model=str(source))


def test_training_does_not_start_with_what_needs_data(source: Path, ranks: Ranks) -> None:
    ranks(1, started, source)
