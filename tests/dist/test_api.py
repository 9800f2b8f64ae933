"""The pieces as docs/api.md puts them together, on a model that was built elsewhere."""

from pathlib import Path

from tests.dist import checkpoints
from tests.dist.test_layouts import digests, export_all, folder


def quantize_live_model(source: Path, out: Path) -> int:
    import torch

    from megatron_quant.runs.megatron import producer
    from megatron_quant.calib.calibration import calibrate
    from megatron_quant.ckpt.write.carried import beside as found_beside
    from megatron_quant.ckpt.plan.sidecars import companions
    from megatron_quant.ckpt.dialects.registry import get_dialect
    from megatron_quant.ckpt.plan.ranks import Layout
    from megatron_quant.ckpt.plan.provenance import Origin, recipe_digest, source_digest
    from megatron_quant.ckpt.plan.export_plan import plan_export
    from megatron_quant.ckpt.read.directory import open_directory
    from megatron_quant.ckpt.plan.quantizable import slots
    from megatron_quant.ckpt.write.exporter import export
    from megatron_quant.layers.install import attach
    from megatron_quant.mcore.model.load import load_model, wrap_model
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.models import lookup
    from megatron_quant.recipes.load import load_recipe
    from megatron_quant.recipes.resolution import resolve

    groups = start_distributed()
    checkpoint = open_directory(source)
    architecture = lookup(checkpoint.config)
    layout = Layout.simulate(groups.size, 2, 2, 1, 8)
    elsewhere = load_model(
        checkpoint, architecture, layout, groups, torch.bfloat16, lambda steps: None
    )

    model = wrap_model(elsewhere.module, architecture, checkpoint.config, groups)
    recipe = load_recipe("w4a16_nvfp4")
    plan = resolve(recipe, slots(model.params))
    layers = attach(model.module, plan, [p.weight for p in model.local])
    calibrate(layers, plan, model.groups)
    dialect = get_dialect("modelopt")
    files = plan_export(model.params, plan, dialect, model.layout, torch.bfloat16, 300_000)
    origin = Origin(recipe_digest(recipe), source_digest(source))
    found = found_beside(source)
    beside = companions(checkpoint.config, plan, dialect, torch.bfloat16, origin)
    beside = beside.beside(source, found.carried, found.left_out)
    export(files, model.groups, producer(model, layers), out, beside)
    return len(layers)


def test_a_live_model_is_exported_as_the_command_does(tmp_path: Path, ranks) -> None:
    source = checkpoints.save("qwen3_moe", tmp_path / "source")
    assert ranks(4, quantize_live_model, source, tmp_path / "live") == [8] * 4
    case = {"export_quant_cfg": "w4a16_nvfp4"}
    ranks(1, export_all, source, tmp_path, 1, 1, 1, [case])
    assert digests(tmp_path / "live") == digests(tmp_path / folder(case))
