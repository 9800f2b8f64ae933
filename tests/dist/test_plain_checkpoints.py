"""Training checkpoints without quantizers: exports as from the Hugging Face folder of the weights."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml


from megatron_quant.ckpt.storage import MANIFEST
from megatron_quant.models import Pipeline, lookup
from tests.dist import checkpoints, plain, saved
from tests.dist.plain import Training
from tests.dist.command import command, quantize_argv, refused
from tests.dist.pool import Ranks
from tests.dist.test_layouts import digests
from tests.unit import plain_world, sources

SIZES = {"num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 64, "head_dim": 32}
CALIBRATED = {"calib_size": 4, "calib_seq_length": 32, "cold_experts": "layer-max"}
CASES = {
    "weights": {"export_quant_cfg": "nvfp4", "weight_only": True},
    "calibrated": {"export_quant_cfg": "fp8", "export_kv_cache_quant": "fp8", **CALIBRATED},
}
VIRTUAL = ((2, 2, 1), Pipeline(2, 2))
RUNS = {
    "stacked": (2, Training((2, 1, 2), stacked=True, common=False)),
    "apart": (1, Training(beside=True)),
    "virtual": (4, Training(*VIRTUAL, padding=128, beside=True)),
    "virtual_stacked": (4, Training(*VIRTUAL, stacked=True, padding=128)),
}


def quantize_each(
    source: Path, out: Path, runs: Sequence[Path | None], tp: int, ep: int
) -> None:
    """Every case from every run, or from the folder itself where that is None."""
    for run in runs:
        for name, case in CASES.items():
            saved.quantize(
                hf_model_id=str(source),
                megatron_load_path=run,
                export_dir=out / f"{run.name if run else 'hf'}.{name}",
                tp=tp,
                ep=ep,
                **case,
            )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source") / "hf", **SIZES)


@pytest.fixture(scope="module")
def bare(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder without its weights."""
    folder = tmp_path_factory.mktemp("bare") / "hf"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


@pytest.fixture(scope="module")
def runs(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, (world, how) in RUNS.items():
        ranks(world, plain.save_run, source, folder / name, how)
    return folder


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    ranks(4, quantize_each, source, folder, [None], 2, 2)
    return folder


def files_of(export: Path) -> dict[str, str]:
    """The files but for the manifest, which says what the export is made of."""
    return {name: d for name, d in digests(export).items() if name != MANIFEST}


def test_every_way_of_saving(
    runs: Path, bare: Path, exported: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Byte for byte, at another layout, with no weights in the Hugging Face folder."""
    ranks(4, quantize_each, bare, tmp_path, [runs / name for name in RUNS], 2, 2)
    for case in CASES:
        wanted = files_of(exported / f"hf.{case}")
        for name in RUNS:
            assert files_of(tmp_path / f"{name}.{case}") == wanted, (name, case)


def stream_each(source: Path, out: Path, runs: Sequence[Path | None]) -> None:
    from megatron_quant.cli.console import ConsolePhases, console
    from megatron_quant.dist import Groups
    from megatron_quant.runs.file_to_file import stream_files
    from megatron_quant.runs.options import QuantizeOptions

    for run in runs:
        for name, case in CASES.items():
            options = QuantizeOptions.from_flags(
                hf_model_id=str(source),
                megatron_load_path=run,
                export_dir=out / f"{run.name if run else 'hf'}.{name}",
                calib_dataset=__file__,
                **case,
            )
            stream_files(options, Groups(), ConsolePhases(console()))


def test_a_stream_of_every_way_of_saving(
    source: Path, runs: Path, bare: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """File to file, without a model; transformers' forward runs on the run's own weights."""
    ranks(1, stream_each, source, tmp_path, [None])
    ranks(1, stream_each, bare, tmp_path, [runs / name for name in RUNS])
    for case in CASES:
        wanted = files_of(tmp_path / f"hf.{case}")
        for name in RUNS:
            assert files_of(tmp_path / f"{name}.{case}") == wanted, (name, case)


def test_a_stream_needs_no_megatron(bare: Path, runs: Path, tmp_path: Path) -> None:
    """The run brings config.json and tokenizer in its own folder."""
    run = shutil.copytree(runs / "apart", tmp_path / "run")
    shutil.copytree(bare, run / "iter_0000003" / "hf")
    code = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megatron", "transformer_engine", "modelopt"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from megatron_quant.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    argv = ["quantize", "--stream", "--megatron-load-path", str(run)]
    argv += ["--export-quant-cfg", "nvfp4", "--weight-only", "--export-dir", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stderr + done.stdout


def searched(source: Path, out: Path, run: Path | None) -> None:
    import megatron_quant as mq

    text = {"dataset": __file__, "size": 4, "seq_length": 32}
    mq.quantize_checkpoint(
        source,
        None,
        out,
        parallel=mq.Parallel(ep=2),
        calibration=mq.Calibration(**text, cold_experts="layer-max"),
        auto=mq.AutoQuantize(bits=6.0, score_size=4, recipe=out.with_suffix(".yaml")),
        megatron_load_path=run,
    )


def test_a_search_scores_a_run_as_its_folder(
    source: Path, runs: Path, bare: Path, tmp_path: Path, ranks: Ranks
) -> None:
    ranks(2, searched, source, tmp_path / "hf", None)
    ranks(2, searched, bare, tmp_path / "run", runs / "stacked")
    found = [(tmp_path / f"{name}.yaml").read_bytes() for name in ("hf", "run")]
    assert found[0] == found[1]
    assert files_of(tmp_path / "hf") == files_of(tmp_path / "run")


def test_a_stream_of_a_quantized_run_is_refused(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    case = {"export_quant_cfg": "nvfp4", "weight_only": True}
    ranks(1, saved.quantize_all, source, tmp_path, (1, 1, 1), {"one": case})
    argv = ["quantize", "--stream", "--megatron-load-path", str(tmp_path / "one.saved")]
    ended = command(*argv, "--export-dir", str(tmp_path / "out"))
    assert ended.status == 1
    assert "export it with megatron-quant export --megatron-load-path" in ended.err
    assert not (tmp_path / "out").exists()


def test_layers_for_speculation(tmp_path: Path, ranks: Ranks) -> None:
    """As megatron-core's own model of them saves them; they keep their Hugging Face names."""
    source = checkpoints.save("deepseek_v3", tmp_path / "hf", num_hidden_layers=3)
    found, beyond = sources.tensors(source), "model.layers.2."
    hidden, seeded = 128, torch.Generator().manual_seed(1)
    found |= {
        f"{beyond}{name}.weight": torch.randn(shape, generator=seeded).bfloat16()
        for name, shape in (
            ("eh_proj", (hidden, 2 * hidden)),
            ("enorm", (hidden,)),
            ("hnorm", (hidden,)),
            ("shared_head.norm", (hidden,)),
        )
    }
    found[f"{beyond}embed_tokens.weight"] = found["model.embed_tokens.weight"].clone()
    found[f"{beyond}shared_head.head.weight"] = found["lm_head.weight"].clone()
    sources.write(source, found)
    sources.config(source, num_hidden_layers=2, num_nextn_predict_layers=1)
    ranks(1, plain.save_with_drafts, source, tmp_path / "run")
    case = {"export_quant_cfg": "nvfp4", "weight_only": True, "tp": 2, "ep": 2}
    case |= {"quantize_mtp": True}
    for run in (None, tmp_path / "run"):
        out = tmp_path / f"out.{run is None}"
        ranks(2, quantize_one, source, run, out, case)
    assert files_of(tmp_path / "out.True") == files_of(tmp_path / "out.False")
    found = sources.tensors(tmp_path / "out.False")
    assert {f"{beyond}enorm.weight", f"{beyond}mlp.experts.7.up_proj.weight_scale"} <= found.keys()


def quantize_one(source: Path | None, run: Path | None, out: Path, case: dict[str, Any]) -> None:
    hf = None if source is None else str(source)
    saved.quantize(hf_model_id=hf, megatron_load_path=run, export_dir=out, **case)


def quantize_in_python(source: Path, run: Path, out: Path) -> None:
    import megatron_quant as mq

    flags: dict[str, Any] = {"megatron_load_path": str(run), "skip_keys": ["*vision_model.*"]}
    flags["weight_only"] = True
    mq.quantize_checkpoint(source, "nvfp4", out, parallel=mq.Parallel(ep=2), **flags)


def test_megatron_fsdp(source: Path, exported: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Cut over 3 ranks, which divide no tensor evenly; without metadata.json."""
    tensors = plain_world.of_fsdp(plain_world.tensors_of(source), prefix="")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    tensors["vision_model.patch.weight"] = torch.ones(6, 2)
    ranks(3, plain.save_as_fsdp, tmp_path / "run" / "iter_0000005", tensors)
    ranks(2, quantize_in_python, source, tmp_path / "run", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(exported / "hf.weights")


def save_fsdp(source: Path, folder: Path) -> None:
    from tests.dist import fsdp

    fsdp.save(source, folder)


def test_megatron_fsdps_own_saving(
    source: Path, bare: Path, exported: Path, tmp_path: Path, ranks: Ranks
) -> None:
    ranks(2, save_fsdp, source, tmp_path / "run" / "iter_0000005")
    assert not (tmp_path / "run" / "iter_0000005" / "metadata.json").exists()
    case = {**CASES["weights"], "ep": 2}
    ranks(2, quantize_one, bare, tmp_path / "run", tmp_path / "out", case)
    assert files_of(tmp_path / "out") == files_of(exported / "hf.weights")


def test_a_model_that_the_run_says(
    source: Path, bare: Path, runs: Path, exported: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Its sizes from run_config.yaml, its tokenizer from where that says; without --hf-model-id."""
    config = json.loads((source / "config.json").read_text())
    architecture = lookup(config)
    model = {**architecture.megatron_config(config), **architecture.gpt_config(config)}
    model |= {"activation_func": {"_target_": "torch.nn.functional.silu"}, "seq_length": 256}
    tokenizer = shutil.copytree(bare, tmp_path / "tok", ignore=shutil.ignore_patterns("config.json"))
    said = {"model": model, "tokenizer": {"tokenizer_model": str(tokenizer)}}
    run = shutil.copytree(runs / "apart", tmp_path / "run")
    (run / "iter_0000003" / "run_config.yaml").write_text(yaml.safe_dump(said))
    case = {**CASES["weights"], "tp": 2, "ep": 2, "megatron_save_path": tmp_path / "saved"}
    ranks(2, quantize_one, None, run, tmp_path / "out", case)
    ranks(1, quantize_one, None, tmp_path / "saved", tmp_path / "again", {"export_quant_cfg": None})
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
    found, wanted = files_of(tmp_path / "out"), files_of(exported / "hf.weights")
    assert found.keys() == wanted.keys()
    assert found["model.safetensors"] == wanted["model.safetensors"]


def test_what_is_refused(source: Path, runs: Path, tmp_path: Path, ranks: Ranks) -> None:
    """In one line on every rank; nothing is written."""
    argv = ["quantize", "--megatron-load-path", str(runs / "apart"), "--export-dir"]
    argv += [str(tmp_path / "out"), "--hf-model-id", str(source), "--tp", "2"]
    recipe = ["--export-quant-cfg", "nvfp4", "--weight-only"]
    for more, words in (
        ([], "apart is not quantized: run quantize with --megatron-load-path, --hf-model-id and"),
        ([*recipe, "--skip-keys", "mtp.*"], "--skip-keys mtp.* matches no key of"),
        ([*recipe, "--skip-keys", "decoder.layers.1.*"], "has no decoder.layers.1.self_attention."),
        ([*recipe, "--keep-scales"], "--keep-scales"),
    ):
        assert words in refused(ranks, tmp_path, [*argv, *more])
    argv = ["export", "--megatron-load-path", str(runs / "apart"), "--export-format", "modelopt"]
    argv += ["--export-dir", str(tmp_path / "out"), "--hf-model-id", str(source)]
    assert "apart is not quantized" in refused(ranks, tmp_path, argv)
    argv = quantize_argv(source, tmp_path / "out", skip_keys="a")
    assert "--skip-keys leaves out keys of --megatron-load-path" in refused(ranks, tmp_path, argv)


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama"])
def test_other_models(name: str, tmp_path: Path, ranks: Ranks) -> None:
    """Shared experts, biases, sinks, latent attention: every value, stacked and apart."""
    source = checkpoints.save(name, tmp_path / "hf")
    assert ranks(1, plain.read_back, source, tmp_path) == [[]]
