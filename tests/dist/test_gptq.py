"""GPTQ and weighted searches on a live model: equal bytes from one calibration, at every layout."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_layouts import digests
from tests.unit.test_stream_sums import overflowing

PATIENCE_S = 600.0
# name -> (recipe, algorithm, dialect)
CASES = {
    "int4": ("int4", "gptq", "compressed-tensors"),
    "int4-awq": ("int4_asym", "gptq", "awq"),
    "int8": ("int8_group", "gptq", "compressed-tensors"),
    "nvfp4": ("nvfp4", "gptq", "modelopt"),
    "nvfp4-ct": ("w4a16_nvfp4", "gptq", "compressed-tensors"),
    "fp8": ("fp8", "gptq", "compressed-tensors"),
    "fp8-channel": ("fp8_channel", "gptq", "compressed-tensors"),
    "fp8-block": ("fp8_block", "gptq", "fp8"),
    "mxfp8": ("mxfp8", "gptq", "modelopt"),
    "mxfp4": ("mxfp4", "gptq", "compressed-tensors"),
    "imatrix": ("int4_asym", "imatrix", "compressed-tensors"),
    "imatrix-nvfp4": ("w4a16_nvfp4", "imatrix", "modelopt"),
}
ONE = {"tp": 1}
LAYOUTS = {
    "tp2-ep2": (4, {"tp": 2, "ep": 2}),
    "etp2": (4, {"tp": 2, "ep": 2, "etp": 2}),
    "pp2": (2, {"pp": 2}),
}


def run(source: Path, layout: dict, runs: list[dict]) -> None:
    from megatron_quant.cli.console import ConsolePhases, console
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.runs.megatron import quantize_run
    from megatron_quant.runs.options import QuantizeOptions

    data = {"calib_size": 12, "calib_seq_length": 48, "calib_batch_size": 2}
    for one in runs:
        options = QuantizeOptions.from_flags(
            hf_model_id=str(source), cold_experts="layer-max", **{**data, **layout, **one}
        )
        quantize_run(options, start_distributed(), ConsolePhases(console()))


def flags_of(case: tuple[str, str, str], out: Path, **flags: object) -> dict:
    """Flags of an export into ``out``; a case is (recipe, algorithm, dialect)."""
    recipe, algorithm, dialect = case
    return {
        "export_quant_cfg": recipe,
        "algorithm": algorithm,
        "export_format": dialect,
        "export_dir": out,
        **flags,
    }


def case(name: str, out: Path, **flags: object) -> dict:
    return flags_of(CASES[name], out / name, **flags)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def measured(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """A folder with what one rank measured, and the exports that it made of it."""
    folder = tmp_path_factory.mktemp("one")
    file = folder / "kept.safetensors"
    first = case("nvfp4", folder, save_calibration=file, keep_hessians=True)
    rest = [case(name, folder, load_calibration=file) for name in CASES if name != "nvfp4"]
    ranks(1, run, source, ONE, [first, *rest], timeout=PATIENCE_S)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_calibration_gives_equal_bytes(
    layout: str, source: Path, measured: Path, tmp_path: Path, ranks: Ranks
) -> None:
    world, sizes = LAYOUTS[layout]
    file = measured / "kept.safetensors"
    ranks(
        world,
        run,
        source,
        sizes,
        [case(name, tmp_path, load_calibration=file) for name in CASES],
        timeout=PATIENCE_S,
    )
    for name in CASES:
        assert digests(tmp_path / name) == digests(measured / name), name


def stream(source: Path, runs: list[dict]) -> None:
    from megatron_quant.cli.console import ConsolePhases, console
    from megatron_quant.dist import Groups
    from megatron_quant.runs.file_to_file import stream_files
    from megatron_quant.runs.options import QuantizeOptions

    for one in runs:
        options = QuantizeOptions.from_flags(
            hf_model_id=str(source), cold_experts="layer-max", **one
        )
        stream_files(options, Groups(), ConsolePhases(console()))


def test_a_stream_gives_these_bytes_too(
    source: Path, measured: Path, tmp_path: Path, ranks: Ranks
) -> None:
    file = measured / "kept.safetensors"
    runs = [case(name, tmp_path, load_calibration=file) for name in CASES]
    ranks(2, stream, source, runs, timeout=PATIENCE_S)
    for name in CASES:
        assert digests(tmp_path / name) == digests(measured / name), name


def test_second_moments_are_those_of_one_rank(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Three batches for two data-parallel ranks: the one that is repeated counts once."""
    found, few = {}, {}
    layouts = {**LAYOUTS, "dp2": (2, {"tp": 1})}
    for name, (world, sizes) in {"one": (1, ONE), **layouts}.items():
        flags = {"dtype": "fp32", "keep_hessians": True, "calib_size": 6}
        many = {**flags, "save_calibration": tmp_path / f"{name}.safetensors"}
        cold = {**flags, "save_calibration": tmp_path / f"{name}-few.safetensors"}
        cold |= {"calib_size": 2, "calib_seq_length": 2, "calib_batch_size": 1}
        cases = [case("nvfp4", tmp_path / n, **f) for n, f in (("many", many), ("few", cold))]
        for one in cases:
            one["export_dir"] = one["export_dir"] / name
        ranks(world, run, source, sizes, cases)
        found[name] = load_file(many["save_calibration"])
        few[name] = load_file(cold["save_calibration"])
    for name in layouts:
        same(found[name], found["one"])
        same(few[name], few["one"])
    tokens = {n: int(t) for n, t in few["one"].items() if n.endswith("down_proj.input_tokens")}
    unseen = [n for n, count in tokens.items() if not count]
    assert unseen and len(unseen) < len(tokens)
    for name in unseen:
        layer = name.split(".experts.")[0]
        seen = [n for n, count in tokens.items() if n.startswith(f"{layer}.") and count]
        for kind in ("moment", "lost_nvfp4"):
            others = [few["one"][n.replace("tokens", kind)] for n in seen]
            pooled = few["one"][name.replace("tokens", kind)]
            torch.testing.assert_close(pooled, torch.stack(others).sum(0))


def same(found: dict[str, torch.Tensor], one: dict[str, torch.Tensor]) -> None:
    """An input's last bit may give it another code of 4 bits, and that another loss."""
    assert found.keys() == one.keys()
    for key, want in one.items():
        error = (found[key].double() - want.double()).norm() / want.double().norm().clamp(min=1)
        assert error < (1e-2 if "lost" in key else 1e-5), (key, error)


def test_passes_and_checkpoints_change_no_byte(
    source: Path, measured: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Little memory takes more passes; a Megatron checkpoint carries the codes."""
    saved = tmp_path / "saved"
    little = {"calib_memory": "4400KB", "megatron_save_path": saved}
    ranks(1, run, source, ONE, [case("nvfp4", tmp_path / "one", **little)])
    assert digests(tmp_path / "one" / "nvfp4") == digests(measured / "nvfp4")
    loaded = {
        "export_quant_cfg": None,
        "algorithm": None,
        "megatron_load_path": saved,
        "export_dir": tmp_path / "two",
    }
    ranks(2, run, source, {"tp": 2}, [case("nvfp4", tmp_path) | loaded])
    assert digests(tmp_path / "two") == digests(measured / "nvfp4")
    ranks(1, begin_training, source, saved, tmp_path / "three")
    want, found = (load_all(folder) for folder in (measured / "nvfp4", tmp_path / "three"))
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def begin_training(source: Path, saved: Path, out: Path) -> None:
    """Prepare a model, follow its ranges once before any step, and export it."""
    from megatron_quant import export
    from megatron_quant.errors import QuantError
    from megatron_quant.mcore.live import quantized
    from megatron_quant.mcore.training import QuantCallback, prepare
    from megatron_quant.recipes import load_recipe, with_algorithm
    from tests.dist import live

    recipe = with_algorithm(load_recipe("nvfp4"), "gptq")
    module = live.load(source).module
    with pytest.raises(QuantError, match="changes weights by gptq, which needs calibration data"):
        prepare([module], recipe, hf_model=str(source))
    prepare([module], recipe, saved, hf_model=str(source))
    callback = QuantCallback()
    callback.start(module)
    callback.on_step_begin(0)
    callback.on_save(0)
    export(quantized(module), out)


@pytest.mark.parametrize("module", ["layers.1.self_attn.o_proj", "layers.0.mlp.experts.3.down_proj"])
def test_codes_are_those_of_the_plain_algorithm(module: str, source: Path, measured: Path) -> None:
    from megatron_quant import formats
    from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
    from megatron_quant.models import Box
    from megatron_quant.rounding import GptqSettings, gptq, importance
    from tests.unit.gptq_world import plain

    name, fmt = f"model.{module}", formats.get_format("int4")
    w = load_file(source / "model.safetensors")[f"{name}.weight"]
    kept = load_file(measured / "kept.safetensors")
    moment = kept[f"{name}.input_moment"]
    weight = importance(kept[f"{name}.input_squares"], fmt)
    stat, tried = formats.block_stat(w, fmt), formats.MULTIPLIERS["mse"]
    piece = formats.SearchedPiece((0, 0), weight)
    chosen = formats.choose(formats.errors(w, fmt, None, stat, tried, piece), tried)
    scales = formats.scales_of(w, fmt, None, stat * chosen.unsqueeze(-1))
    checkpoint = QuantizedCheckpoint(measured / "int4")
    found = checkpoint.read(f"{name}.weight", Box((0, 0), tuple(w.shape))).float()
    assert torch.equal(found, gptq(w, fmt, scales, moment, GptqSettings()).w)
    want = plain(w, fmt, scales, moment, 0.01)
    assert (found == want).float().mean() > 0.99  # ties of the last bit of fp32
    nearest = formats.decode(formats.encode_on(w, fmt, scales), fmt, torch.float32)
    assert (found == nearest).float().mean() < 0.95


def divergence(source: Path, algorithms: list[str]) -> list[float]:
    """KL(bf16 || quantized) over other tokens than those of calibration."""
    from megatron_quant import quantize
    from megatron_quant.ckpt.storage import read_config
    from megatron_quant.recipes import load_recipe, with_algorithm
    from tests.dist import live

    data = live.batches(12, size=4)
    found = []
    for algorithm in algorithms:
        model = live.load(source, dtype=torch.float32)
        with torch.no_grad():
            bf16 = [live.forward(model.module, ids).log_softmax(-1) for ids in data[8:]]
            recipe = with_algorithm(load_recipe("int4"), algorithm)

            def loop(module: object) -> None:
                for ids in data[:8]:
                    live.forward(module, ids)

            quantize(model.module, recipe, loop, hf_model=read_config(source))
            rounded = [live.forward(model.module, ids).log_softmax(-1) for ids in data[8:]]
        kl = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(bf16, rounded, strict=True)]
        found.append(float(torch.stack(kl).mean()))
    return found


def test_each_algorithm_loses_less_than_the_one_before(source: Path, ranks: Ranks) -> None:
    (found,) = ranks(1, divergence, source, ["max", "imatrix", "gptq"])
    largest, weighted, rounded = found
    assert weighted < 0.95 * largest
    assert rounded < 0.8 * weighted


def test_what_is_refused(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    for error in ranks.errors(2, run, source, ONE, [case("int4", tmp_path, calib_size=1)]):
        assert "1 samples for 2 data-parallel ranks: imatrix and gptq need one for" in str(error)
    small = {"calib_memory": "1MB"}
    ((error),) = ranks.errors(1, run, source, ONE, [case("int4", tmp_path, **small)])
    assert "take 2097152 bytes on a rank, and it is 1000000: give at least that" in str(error)
    amaxes = tmp_path / "amaxes.safetensors"
    first = {**case("nvfp4", tmp_path), "algorithm": "max", "save_calibration": amaxes}
    errors = ranks.errors(
        2, run, source, {"ep": 2}, [first, case("int4", tmp_path, load_calibration=amaxes)]
    )
    for error in errors:
        assert "input_moment: save one with --keep-hessians" in str(error)
    assert not (tmp_path / "int4").exists()


def fails_on_rank_1(source: Path, out: Path) -> None:
    """One rank's matrix has no Cholesky factor, in its last layer or in a linear of whole rows."""
    import torch.distributed as dist

    from megatron_quant.calib import round_layer
    from megatron_quant.errors import CalibrationError

    real = round_layer.gptq_pieces

    def broken(pieces: object, fmt: object, moment: object, how: object) -> object:
        if dist.get_rank() == 1 and "layers.1.mlp.experts.linear_fc1" in how.names[0]:
            raise CalibrationError("no factor")
        return real(pieces, fmt, moment, how)

    round_layer.gptq_pieces = broken
    run(source, {"tp": 2, "ep": 2, "etp": 2}, [case("int4", out)])


def test_no_rank_waits_for_one_that_fails(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Its layer's whole rows fail alone; the layers after it exchange rows with the others."""
    errors = ranks.errors(4, fails_on_rank_1, source, tmp_path)
    assert [str(error) for error in errors] == ["no factor"] * 4
    assert not any(tmp_path.iterdir())


def evaluated(source: Path, out: Path) -> list[float]:
    from megatron_quant.cli.console import ConsolePhases, console
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.runs.megatron import quantize_run
    from megatron_quant.runs.options import QuantizeOptions

    found = []
    for algorithm in ("max", "gptq"):
        options = QuantizeOptions.from_flags(
            hf_model_id=str(source),
            export_quant_cfg="int4",
            algorithm=algorithm,
            export_dir=out / algorithm,
            eval_text=out / "text.txt",
            calib_size=16,
            calib_seq_length=32,
            tp=2,
            dtype="fp32",
        )
        outcome = quantize_run(options, start_distributed(), ConsolePhases(console()))
        assert outcome.fake_quant is not None
        found.append(outcome.fake_quant.mean_kl)
    return found


def test_the_evaluation_compares_with_the_weights_of_before(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    (tmp_path / "text.txt").write_text("What a text says is of no matter here, but its length. " * 4)
    found = ranks(2, evaluated, source, tmp_path)
    assert found[0] == found[1]
    largest, rounded = found[0]
    assert 0.1 * largest < rounded < largest


def test_a_checkpoint_of_gptq_is_not_evaluated(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    saved = {"megatron_save_path": tmp_path / "saved", "export_dir": None, "calib_size": 4}
    ranks(1, run, source, ONE, [case("int4", tmp_path, **saved)])
    loaded = {"export_quant_cfg": None, "algorithm": None, "eval_text": Path(__file__)}
    loaded["megatron_load_path"] = tmp_path / "saved"
    ((error),) = ranks.errors(1, run, source, ONE, [case("int4", tmp_path) | loaded])
    assert "--eval-text compares with the weights before gptq" in str(error)


def test_squares_that_are_not_finite_are_named_on_every_rank(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    large = overflowing(source, tmp_path / "source")
    layout = {"tp": 2, "ep": 2}
    for name in ("imatrix", "int4"):
        errors = ranks.errors(4, run, large, layout, [case(name, tmp_path)])
        said = r"inputs of decoder\.layers\.1\.mlp\.experts\.linear_fc2\.weight\d are not finite"
        assert all(re.search(said, str(error)) for error in errors), errors
        assert len({str(error) for error in errors}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
