"""NemotronH by Megatron's names: what is known of it without the packages that run it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import megatron_quant as mq
from megatron_quant.ckpt.read import Weights, fill, open_source
from megatron_quant.ckpt.write.manifest import MANIFEST
from megatron_quant.errors import ArchitectureError, CheckpointError, LayoutError
from megatron_quant.models import (
    Domain,
    Parallel,
    Param,
    Stage,
    check_layout,
    copies,
    engine_groups,
    has_table,
    local_shape,
    lookup,
    lookup_live,
)
from megatron_quant.models.structure import recognise
from tests.dist import saved
from tests.dist.command import command
from tests.dist.pool import Ranks
from tests.dist.test_layouts import digests
from tests.unit import family_models, plain_world, sources

Tensors = dict[str, torch.Tensor]
INNER, GROUPS, STATE, HEADS = 4 * 16, 2, 16, 4
STORED = {
    "in_proj.weight": {
        "z": INNER,
        "x": INNER,
        "B": GROUPS * STATE,
        "C": GROUPS * STATE,
        "dt": HEADS,
    },
    "conv1d.weight": {"x": INNER, "B": GROUPS * STATE, "C": GROUPS * STATE},
    "conv1d.bias": {"x": INNER, "B": GROUPS * STATE, "C": GROUPS * STATE},
}
"""Parts that MambaMixer's sharded_state_dict makes of a rank's rows, in this order."""
CASES = {"nvfp4": {"export_quant_cfg": "nvfp4"}, "fp8_channel": {}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a layer for speculation."""
    folder = family_models.save("nemotron_h", tmp_path_factory.mktemp("nemotron_h"))
    sources.edit(folder, lambda t: {n: w for n, w in t.items() if not n.startswith("mtp.")})
    return folder


def params_of(folder: Path) -> tuple[Weights, tuple[Param, ...]]:
    weights = open_source(folder)
    return weights, lookup(weights.config).params(weights.config)


def test_the_table_says_what_names_and_shapes_say(source: Path) -> None:
    weights, params = params_of(source)
    shapes = {name: weights.info(name).shape for name in weights}
    found = recognise(weights.config, shapes).params
    one, other = ({s: p.role for p in of for s in p.sources} for of in (params, found))
    assert one == other and len(one) == len(shapes)
    one, other = ({frozenset(group) for group in engine_groups(of)} for of in (params, found))
    assert one == other
    ends = {p.name.partition(".")[0]: p.stage for p in params if p.layer is None}
    assert ends == {"embedding": Stage.FIRST, "decoder": Stage.LAST, "output_layer": Stage.LAST}
    assert {p.layer for p in params if p.stage is Stage.LAYER} == {0, 1, 2, 3}
    assert not has_table(weights.config)  # so that --stream goes by names and shapes


def files_of(out: Path) -> dict[str, str]:
    """Digests of its files, but for the one that says what it was made of."""
    return {name: digest for name, digest in digests(out).items() if name != MANIFEST}


def shards(weights: Weights, param: Param, size: int) -> Iterator[torch.Tensor]:
    for rank in range(size):
        dtype = weights.info(param.sources[0].name).dtype
        local = torch.full(local_shape(param, rank, size), torch.nan, dtype=dtype)
        fill(local, copies(param, rank, size), weights)
        yield local


def saved_at(folder: Path, tp: int, etp: int) -> Tensors:
    """Megatron's keys: what ranks hold, joined as ``sharded_state_dict`` says, in parts."""
    weights, params = params_of(folder)
    found: Tensors = {}
    for param in params:
        size = etp if param.domain is Domain.EXPERT else tp
        own = list(shards(weights, param, size))
        kept = STORED.get(param.name.partition(".mixer.")[2])
        if kept is not None:
            rows = [n // size for n in kept.values()]
            parts = zip(*(local.split(rows) for local in own), strict=True)
            found |= {
                f"{param.name}.{part}": torch.cat(of_part)
                for part, of_part in zip(kept, parts, strict=True)
            }
        elif param.parallel is Parallel.REPLICATED:
            assert all(torch.equal(local, own[0]) for local in own)
            found[param.name] = own[0]
        else:
            found[param.name] = torch.cat(own, int(param.parallel is Parallel.ROW))
    return found


def of_sequential(tensors: Tensors) -> Tensors:
    """Names of the layer spec whose norms are apart, and of experts one by one."""
    return {
        re.sub(r"\.(linear_fc\d)\.weight(\d+)$", r".experts.\2.\1.weight", name)
        .replace(".mixer.in_proj.layer_norm_", ".norm.")
        .replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.")
        .replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."): tensor
        for name, tensor in tensors.items()
    }


def test_a_training_checkpoint_of_any_layout_streams_to_the_same_bytes(
    source: Path, tmp_path: Path
) -> None:
    one, four = saved_at(source, 1, 1), saved_at(source, 2, 2)
    assert one.keys() == four.keys()
    assert all(torch.equal(one[name], four[name]) for name in one)
    assert "decoder.layers.0.mixer.conv1d.bias.B" in one and "decoder.final_norm.weight" in one
    runs = {
        "own": plain_world.write(tmp_path / "run", four),
        "other": plain_world.write(tmp_path / "other", of_sequential(one)),
    }
    for case, flags in CASES.items():
        sources.run(source, tmp_path / case, **flags)
        for name, run in runs.items():
            out = tmp_path / f"{case}.{name}"
            sources.run(source, out, megatron_load_path=run, **flags)
            assert files_of(out) == files_of(tmp_path / case)


def test_parts_in_one_tensor_and_mixers_that_are_missing(source: Path, tmp_path: Path) -> None:
    weights, params = params_of(source)
    whole = {param.name: next(shards(weights, param, 1)) for param in params}
    run = plain_world.write(tmp_path / "whole", whole)  # by a saver of one rank
    sources.run(source, tmp_path / "wanted")
    sources.run(source, tmp_path / "out", megatron_load_path=run)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "wanted")
    for name, metadata, lacks, words in (
        ("dcp", False, "-", r"(in_proj|conv1d)\S* has the rows of \S+ and .* ranks, which nothing"),
        ("mamba", True, ".mixer.", "the config has Mamba layers, the checkpoint has not"),
        ("latent", True, "_latent_proj", "the config has linears around the experts, the checkp"),
    ):
        left = {key: tensor for key, tensor in whole.items() if lacks not in key}
        run = plain_world.write(tmp_path / name, left, metadata)
        with pytest.raises(CheckpointError, match=words):
            sources.run(source, tmp_path / "none", megatron_load_path=run)
    assert not (tmp_path / "none").exists()


def test_a_dry_run_plans_a_layout(source: Path) -> None:
    argv = ["quantize", "--hf-model-id", str(source), "--export-quant-cfg", "nvfp4", "--dry-run"]
    ended = command(*argv, "--tp", "2", "--ep", "2", "--pp", "2", "--verbose")
    assert (ended.status, ended.err) == (0, "")
    for name in ("layers.0.mixer.in_proj", "layers.1.mixer.q_proj", "layers.2.mixer.experts"):
        assert f"backbone.{name}" in ended.out
    other = command(*argv, "--tp", "4")
    assert "--tp 4 does not divide the groups of Mamba's heads (2)" in other.err


NEEDS = (
    "NemotronHForCausalLM runs in Megatron-Core with the package mamba_ssm, which is not "
    "installed, and this library does not build the model yet: pass --stream, which needs neither"
)


def test_a_run_is_refused_on_every_rank_before_a_weight_is_read(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((source / "config.json").read_bytes())
    flags = {"hf_model_id": str(bare), "export_dir": tmp_path / "out", "export_quant_cfg": "fp8"}
    errors = ranks.errors(2, quantize, {**flags, "tp": 2})
    assert [str(error) for error in errors] == [NEEDS] * 2
    assert not (tmp_path / "out").exists()
    errors = ranks.errors(2, quantize_live, bare)
    assert [str(error) for error in errors] == [NEEDS] * 2


def quantize_live(hf: Path) -> None:
    mq.quantize(torch.nn.Linear(1, 1), "fp8", hf_model=hf)


def quantize(flags: dict) -> None:
    saved.quantize(**flags)


def test_with_mamba_ssm_it_is_not_built_either(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sources.config(source)
    with pytest.raises(ArchitectureError, match=f"^{NEEDS}$"):
        lookup_live(config)
    monkeypatch.setattr("megatron_quant.models.registry.find_spec", lambda name: name)
    words = "is not built by this library yet, though mamba_ssm is installed: pass --stream"
    with pytest.raises(ArchitectureError, match=words):
        lookup_live(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hybrid_override_pattern": "M*EX"}, "hybrid_override_pattern='M.EX' .* must name the"),
        (
            {"hybrid_override_pattern": None, "layers_block_type": ["moe", 3]},
            "must name the layers",
        ),
        ({"num_hidden_layers": 5}, "num_hidden_layers=5 .* hybrid_override_pattern names 4 layers"),
        ({"n_groups": 3}, "n_groups=3 in config.json does not divide mamba_num_heads=4"),
        ({"use_bias": True}, "use_bias=True in config.json is not supported"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act='silu' in config.json is not supported"),
        ({"block_configs": [{}]}, "block_configs .* pass --stream"),
        ({"moe_latent_size": 0}, "moe_latent_size=0"),
    ],
)
def test_another_config(source: Path, changes: dict, words: str) -> None:
    config = {**json.loads((source / "config.json").read_text()), **changes}
    with pytest.raises(ArchitectureError, match=words):
        lookup(config).params(config)


def test_layers_as_transformers_lists_them(source: Path) -> None:
    config = sources.config(source)
    kinds = ["linear_attention", "full_attention", "moe", "mlp"]
    listed = {**config, "hybrid_override_pattern": None, "layers_block_type": kinds}
    assert lookup(listed).params(listed) == lookup(config).params(config)
    plain = {**config, "moe_latent_size": None, "n_shared_experts": 0, "use_conv_bias": False}
    names = [param.name for param in lookup(plain).params(plain)]
    assert not any(re.search("latent|shared|conv1d.bias", name) for name in names)
    with pytest.raises(LayoutError, match="--ep 3 does not divide the experts of a layer"):
        check_layout(config, 1, 3, 1)
