"""Models that somebody else's script built: any padding of the vocabulary, wrapped or not."""

import re
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_quant.errors import ArchitectureError
from tests.dist import checkpoints, saved
from tests.dist.command import quantize_argv
from tests.dist.pool import Ranks
from tests.dist.test_layouts import digests

# 258 tokens: Megatron-LM makes 384, 512 and 512 rows of them. At tp 4 the third rank has two rows
# and the last one has none.
SIZES = {"num_experts": 4, "moe_intermediate_size": 128, "mlp_only_layers": [1]}
RECIPE = "w4a16_nvfp4"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


@pytest.fixture(scope="module")
def streamed(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """The same weights exported from the Hugging Face folder, without any model."""
    out = tmp_path_factory.mktemp("streamed") / "out"
    flags = {"export_quant_cfg": RECIPE, "max_shard_size": "300KB", "stream": True}
    argv = quantize_argv(source, out, **flags, tp=None, ep=None, weight_only=None)
    (ended,) = ranks(1, saved.commands, [argv])[0]
    assert ended.status == 0, ended.err
    return out


def export_live(source: Path, out: Path, module: Any) -> None:
    """Quantize and export a live model, as docs/api.md does; its tensors are those of the files."""
    import megatron_quant as mq

    handle = mq.quantize(module, RECIPE, hf_model=source)
    mq.export(module, out, write=mq.Write(max_shard_size="300KB"))
    files = {}
    for path in sorted(out.glob("*.safetensors")):
        files |= load_file(path)
    streamed = dict(mq.export_tensors(handle, max_bytes=50_000))
    assert streamed.keys() == files.keys()
    for name, tensor in files.items():
        assert streamed[name].dtype == tensor.dtype, name
        assert torch.equal(stored_bytes(streamed[name]), stored_bytes(tensor)), name


def stored_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def build_and_export(source: Path, out: Path, tp: int, wrapped: bool) -> int:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from tests.dist import bare

    module = bare.filled(bare.built(source, tp, ep=tp), source)
    rows = module.output_layer.weight.shape[0]
    if wrapped:
        config = module.config
        half = Float16Module(config, module)
        module = [DistributedDataParallel(config, DistributedDataParallelConfig(), half)]
    export_live(source, out, module)
    return rows


@pytest.mark.parametrize(("tp", "rows"), [(1, 384), (2, 256), (4, 128)])
def test_padded_as_megatron_lm_does(
    tp: int, rows: int, source: Path, streamed: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Every byte is that of the weights in the Hugging Face folder, wrapped or not."""
    assert ranks(tp, build_and_export, source, tmp_path / "out", tp, tp == 2) == [rows] * tp
    assert weights(tmp_path / "out") == weights(streamed)


def weights(directory: Path) -> dict[str, str]:
    """Digests of everything but the manifest, which also says where it all came from."""
    found = {k: v for k, v in digests(directory).items() if "manifest" not in k}
    assert len(found) > 6, found
    return found


def train_and_save(source: Path, stored: Path, again: Path) -> None:
    """A hook's model at tp 2 saved as Megatron-LM saves it; one at tp 4 prepared from that."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu

    from megatron_quant.mcore.live import quantized
    from megatron_quant.mcore.training import prepare
    from tests.dist import bare

    model = bare.filled(bare.built(source, 2, ep=1), source)
    prepare([model], RECIPE, hf_model=str(source))
    said = quantized(model).summary().splitlines()[-1]
    assert re.fullmatch(r"weights calibrated; 0 of \d+ static input scales found", said), said
    dp = mpu.get_data_parallel_group(with_context_parallel=True)
    if dist.get_rank() == 0:
        stored.mkdir()
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(metadata={"dp_cp_group": dp}), str(stored))
    other = bare.built(source, 4, ep=4)
    for parameter in other.parameters():
        parameter.data.fill_(float("nan"))
    prepare([other], RECIPE, stored, hf_model=str(source))
    dp = mpu.get_data_parallel_group(with_context_parallel=True)
    if dist.get_rank() == 0:
        again.mkdir()
    dist.barrier()
    dist_checkpointing.save(other.sharded_state_dict(metadata={"dp_cp_group": dp}), str(again))


def test_saved_and_loaded_with_other_paddings(
    source: Path, streamed: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Saved with 512 rows, read into 512 rows that are cut otherwise, exported from 258."""
    ranks(4, train_and_save, source, tmp_path / "one", tmp_path / "two")
    argvs = [
        ["export", "--megatron-load-path", str(tmp_path / name), "--hf-model-id", str(source)]
        + ["--export-dir", str(tmp_path / f"{name}.out"), "--export-format", "modelopt"]
        + ["--max-shard-size", "300KB", "--tp", "2"]
        for name in ("one", "two")
    ]
    for of_rank in ranks(2, saved.commands, argvs):
        assert [ended.status for ended in of_rank] == [0, 0], of_rank
    for name in ("one", "two"):
        assert weights(tmp_path / f"{name}.out") == weights(streamed)


def wrap(source: Path, tp: int, change: str, value: Any, hf: dict[str, Any]) -> None:
    """What becomes of a model with one setting that differs, under a config with others."""
    import torch

    from megatron_quant.mcore.model.load import wrap_model
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.models import lookup
    from tests.dist import bare

    module: Any = bare.built(source, tp, 1)
    if change == "linear":
        module = torch.nn.Linear(2, 2)
    elif change:
        setattr(module.config, change, value)
    hf_config = json.loads((source / "config.json").read_text()) | hf
    names = [type(m) for m in module.modules()]
    try:
        wrap_model(module, lookup(hf_config), hf_config, start_distributed())
    finally:
        assert [type(m) for m in module.modules()] == names


RAW, NORMED = {"norm_topk_prob": False}, {"norm_topk_prob": True}
# (setting of the model, its value, changes of config.json, what is said)
REFUSED = [
    ("", None, {"intermediate_size": 256}, "decoder.layers.1.mlp.linear_fc1.weight is (512, 128)"),
    ("", None, {"moe_intermediate_size": 64}, "experts.linear_fc1.weight0 is (256, 128)"),
    ("", None, {"vocab_size": 600}, "vocabulary has 512 rows, padding included"),
    ("", None, {"num_hidden_layers": 3}, "has 2 layers (0, 1), but config.json says 3"),
    ("", None, {"num_local_experts": 8}, "num_moe_experts=4 in the TransformerConfig, but"),
    ("", None, {"num_key_value_heads": 2, "head_dim": 128}, "num_query_groups=4"),
    ("", None, {"rms_norm_eps": 1e-5}, "layernorm_epsilon=1e-06 in the TransformerConfig, but"),
    ("layernorm_zero_centered_gamma", True, {}, "config.json makes it False"),
    ("rotary_interleaved", True, {}, "orders the rows of q and k in another way"),
    ("activation_func", max, {}, "activation_func=max in the TransformerConfig"),
    ("moe_router_pre_softmax", False, RAW, "moe_router_pre_softmax=False in the TransformerConfig,"),
    ("moe_router_pre_softmax", True, NORMED, "moe_router_pre_softmax=True in the TransformerConfig,"),
    ("moe_mlp_glu_interleave_size", 32, {}, "moe_mlp_glu_interleave_size=None"),
    ("mtp_num_layers", 1, {}, "mtp_num_layers=1 in the TransformerConfig adds layers"),
    ("linear", None, {}, "Linear is no GPTModel"),
]


def all_refused(source: Path) -> list[str]:
    said = []
    for change, value, hf, _ in REFUSED:
        try:
            wrap(source, 2, change, value, hf)
        except ArchitectureError as e:
            said.append(str(e))
    return said


def test_what_does_not_fit_is_refused_before_anything_changes(source: Path, ranks: Ranks) -> None:
    for said in ranks(2, all_refused, source):
        assert len(said) == len(REFUSED), said
        for line, (*_, words) in zip(said, REFUSED, strict=True):
            assert words in line and "\n" not in line


def groups_of_its_own(source: Path) -> None:
    """Built at tp 2, while Megatron's present groups are at tp 1."""
    from megatron.core import parallel_state as mpu

    from megatron_quant.mcore.model.load import wrap_model
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.models import lookup
    from tests.dist import bare

    module = bare.built(source, 2, 1)
    hf_config = json.loads((source / "config.json").read_text())
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(1)
    wrap_model(module, lookup(hf_config), hf_config, start_distributed())


def test_process_groups_that_megatron_does_not_know(source: Path, ranks: Ranks) -> None:
    for error in ranks.errors(2, groups_of_its_own, source):
        assert isinstance(error, ArchitectureError)
        assert "built with a tp group of its own (rank 0 of 2)" in str(error)


# Of megatron-core 0.19, with what a script would give them.
NEWER = {
    "moe_mlp_glu_interleave_size": 32,
    "moe_shared_expert_glu_interleave_size": 32,
    "moe_single_grouped_weight": True,
    "moe_single_grouped_bias": True,
    "mla_down_proj_fusion": True,
    "use_grouped_gemm_for_dense_mlp": True,
    "use_grouped_gemm_for_shared_expert": True,
    "use_transformer_engine_op_fuser": True,
    "use_mup": True,
    "moe_router_force_biased": 1.0,
    "mtp_use_repeated_layer": True,
}


def settings(source: Path) -> tuple[str, set[str], list[str]]:
    """The release, fields that it has, and what is said of every known setting's other values."""
    from dataclasses import fields

    import megatron.core
    from megatron.core.transformer import MLATransformerConfig

    from megatron_quant.mcore.model.settings import KNOWN, check_settings
    from megatron_quant.models import lookup
    from tests.dist import bare

    config = bare.built(source, 1, 1).config
    hf_config = json.loads((source / "config.json").read_text())
    described = lookup(hf_config).megatron_config(hf_config)
    check_settings(config, described)
    said = []
    for name in KNOWN:
        before = getattr(config, name, KNOWN[name][0][0])
        setattr(config, name, NEWER.get(name, "other"))
        try:
            check_settings(config, described)
        except ArchitectureError as e:
            said.append(str(e).partition("=")[0])
        setattr(config, name, before)
    assert said == list(KNOWN)
    return megatron.core.__version__, {f.name for f in fields(MLATransformerConfig)}, said


def test_settings_by_name(source: Path, ranks: Ranks) -> None:
    """Defaults pass, every other value is refused, and the names are those of the release."""
    ((release, has, said),) = ranks(1, settings, source)
    assert NEWER.keys() <= set(said)
    newer = tuple(map(int, release.split(".")[:2])) >= (0, 19)
    of_old = {"moe_use_legacy_grouped_gemm", "heterogeneous_block_specs"}
    assert set(said) - has <= (of_old if newer else NEWER.keys())


def build_interleaved(source: Path) -> None:
    """A model that 0.19 builds with other rows of the same shape; 0.16 has no such field."""
    from megatron_quant.mcore.model.load import wrap_model
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.models import lookup
    from tests.dist import bare

    name, has = "moe_mlp_glu_interleave_size", settings(source)[1]
    module = bare.built(source, 1, 1, **({name: 32} if name in has else {}))
    plain = bare.built(source, 1, 1)
    shapes = [[tuple(p.shape) for p in m.parameters()] for m in (module, plain)]
    assert shapes[0] == shapes[1]
    module.config.moe_mlp_glu_interleave_size = 32
    hf_config = json.loads((source / "config.json").read_text())
    wrap_model(module, lookup(hf_config), hf_config, start_distributed())


def test_rows_that_a_release_interleaves(source: Path, ranks: Ranks) -> None:
    (error,) = ranks.errors(1, build_interleaved, source)
    assert isinstance(error, ArchitectureError), error
    assert "moe_mlp_glu_interleave_size=32 in the TransformerConfig orders the rows" in str(error)
