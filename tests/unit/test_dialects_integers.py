"""The JSON of GPTQ, AWQ and AutoRound, and the values of their tensors."""

import json
import re
from dataclasses import replace

import pytest
import torch

from megatron_quant.ckpt.dialects.base import SHAPE, ModuleFormat
from megatron_quant.ckpt.dialects.registry import get_dialect
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.formats import decode, encode, get_format
from megatron_quant.formats.spec import CHANNEL, Format
from megatron_quant.recipes.plan import Decision, QuantPlan, Slot
from tests.unit import exported

GPTQ, AWQ, ROUND = map(get_dialect, ("gptq", "awq", "auto-round"))
NAMES = tuple(s.module for p in exported.PARAMS for s in p.sources if len(s.shape) == 2)
ATTENTION = tuple(f"model.layers.0.self_attn.{p}_proj" for p in "qkvo")
EXPERT = "model.layers.0.mlp.experts.1.up_proj"
ROUTER = "model.layers.0.mlp.gate"
SIZES = (32, 64, 128, CHANNEL)
FORMATS = [get_format(n, g) for n in ("int4", "int8_group", "int4_asym") for g in SIZES]


def uniform(fmt: Format) -> QuantPlan:
    quant = exported.plan("int4")
    decisions = (replace(d, weights=fmt) if d.quantized else d for d in quant.decisions)
    return QuantPlan("test", tuple(decisions))


def mixed(attention: Format, experts: Format) -> QuantPlan:
    decisions = (
        replace(d, weights=experts if "experts" in d.slot.name else attention) if d.quantized else d
        for d in exported.plan("int4").decisions
    )
    return QuantPlan("mixed", tuple(decisions))


def formats_of(quant: QuantPlan) -> dict[str, ModuleFormat]:
    return {n: ModuleFormat(d.weights, None) for d in quant.quantized for n in d.slot.sources}


def through_json(config: dict) -> dict:
    return json.loads(json.dumps(config))


# The formulas of each packing, element by element


def code_in(word: int, slot: int, bits: int) -> int:
    return (word >> (bits * slot)) & (2**bits - 1)


@pytest.mark.parametrize("fmt", FORMATS)
def test_gptq_decodes_by_its_formula(fmt):
    w_NK = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    fields = encode(w_NK, fmt, None) | {SHAPE: torch.tensor((16, 128))}
    disk = {s.suffix: s.to_disk(fields[s.field]) for s in GPTQ.stored(fmt, None)}
    qweight, qzeros, scales = (disk[n].tolist() for n in ("qweight", "qzeros", "scales"))
    group, per_word = disk["g_idx"].tolist(), 32 // fmt.bits
    decoded = decode(fields, fmt, torch.float32)
    for n, k in ((0, 0), (5, 9), (15, 127), (8, 63), (3, 64)):
        code = code_in(qweight[k // per_word][n], k % per_word, fmt.bits)
        zero = code_in(qzeros[group[k]][n // per_word], n % per_word, fmt.bits) + 1
        assert (code - zero % 2**fmt.bits) * scales[group[k]][n] == decoded[n, k]


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.bits == 4])
def test_awq_decodes_by_its_formula(fmt):
    w_NK = torch.randn(16, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    fields = encode(w_NK, fmt, None) | {SHAPE: torch.tensor((16, 128))}
    disk = {s.suffix: s.to_disk(fields[s.field]) for s in AWQ.stored(fmt, None)}
    qweight, qzeros, scales = (disk[n].tolist() for n in ("qweight", "qzeros", "scales"))
    decoded, size = decode(fields, fmt, torch.float32), fmt.group_size
    slots = [(0, 2, 4, 6, 1, 3, 5, 7).index(i) for i in range(8)]
    for n, k in ((0, 0), (5, 9), (15, 127), (8, 63), (3, 64)):
        group = k // size if size > 0 else 0
        code = code_in(qweight[k][n // 8], slots[n % 8], 4)
        zero = code_in(qzeros[group][n // 8], slots[n % 8], 4)
        assert (code - zero) * scales[group][n] == decoded[n, k]


def test_auto_round_has_the_tensors_of_the_other_two():
    int4, asym = get_format("int4", 32), get_format("int4_asym", 32)
    gptq = [s for s in GPTQ.stored(int4, None) if s.suffix != "g_idx"]
    assert list(ROUND.stored(int4, None)) == gptq
    assert ROUND.stored(asym, None) == AWQ.stored(asym, None)


# JSON


@pytest.mark.parametrize("fmt", [f for f in FORMATS if not f.zero_point])
def test_gptq_config(fmt):
    config = through_json(GPTQ.quantization_config(uniform(fmt)))
    assert {k: v for k, v in config.items() if k != "dynamic"} == {
        "quant_method": "gptq",
        "bits": fmt.bits,
        "group_size": fmt.group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }
    assert set(config["dynamic"]) == {
        r"-:^model\.(embed_tokens)$",
        r"-:^model\.layers\.0\.mlp\.(gate)$",
    }
    assert GPTQ.read_config(config, NAMES) == formats_of(uniform(fmt))


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.bits == 4])
def test_awq_config(fmt):
    config = through_json(AWQ.quantization_config(uniform(fmt)))
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": fmt.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["model.embed_tokens", ROUTER, "lm_head"],
    }
    found = AWQ.read_config(config, NAMES)
    asymmetric = ModuleFormat(get_format("int4_asym", fmt.group_size), None)
    assert found == dict.fromkeys(formats_of(uniform(fmt)), asymmetric)


@pytest.mark.parametrize("fmt", FORMATS)
def test_auto_round_config(fmt):
    config = through_json(ROUND.quantization_config(uniform(fmt)))
    packing = "auto_awq" if fmt.zero_point else "auto_gptq"
    assert config["packing_format"] == f"auto_round:{packing}"
    assert config["block_name_to_quantize"] == "model.layers"
    assert config["extra_config"] == {ROUTER: {"bits": 16, "data_type": "float"}}
    stated = (config["bits"], config["group_size"], config["sym"], config["data_type"])
    assert stated == (fmt.bits, fmt.group_size, not fmt.zero_point, "int")
    assert ROUND.read_config(config, NAMES) == formats_of(uniform(fmt))


@pytest.mark.parametrize("choice", ["mxfp4", "mxfp4 weights", "mxfp8"])
def test_auto_round_of_microscaling(choice):
    quant = exported.plan(choice)
    config = through_json(ROUND.quantization_config(quant))
    assert config["packing_format"] == "auto_round:llm_compressor"
    assert config["data_type"] == "mx_fp" and config["group_size"] == 32
    assert ("act_bits" in config) == (exported.formats(choice)[1] is not None)
    found = ROUND.read_config(config, NAMES)
    assert set(found.values()) == {ModuleFormat(*exported.formats(choice))}


@pytest.mark.parametrize(
    ("dialect", "choice"), [(GPTQ, "int4"), (AWQ, "int4_asym"), (ROUND, "int4")]
)
def test_excluded_layers(dialect, choice):
    quant = exported.plan(choice, keep=lambda m: "self_attn" in m)
    config = through_json(dialect.quantization_config(quant))
    found = dialect.read_config(config, NAMES)
    assert set(found) == {n for d in quant.quantized for n in d.slot.sources}
    quant = exported.plan(choice, keep=lambda m: "experts" in m)
    found = dialect.read_config(through_json(dialect.quantization_config(quant)), NAMES)
    assert set(found) == set(ATTENTION)


def test_gptq_skips_what_engines_fuse():
    quant = exported.plan("int4", keep=lambda m: m in ATTENTION[:3])
    dynamic = GPTQ.quantization_config(quant)["dynamic"]
    skipped = [re.compile(p[2:]) for p in dynamic if p.startswith("-:")]
    for name in (*ATTENTION[:3], "model.layers.0.self_attn.qkv_proj"):
        assert any(p.match(name) for p in skipped), name
    for name in (ATTENTION[3], "model.layers.10.self_attn.q_proj", EXPERT):
        assert not any(p.match(name) for p in skipped), name
    dynamic = GPTQ.quantization_config(exported.plan("int4", keep=lambda m: "experts" in m))
    skipped = [re.compile(p[2:]) for p in dynamic["dynamic"]]
    for name in (EXPERT, "model.layers.0.mlp.experts", "model.layers.0.mlp.experts.0.w1"):
        assert any(p.match(name) for p in skipped), name


MIXTURES = [
    (get_format("int8_group", 32), get_format("int4", 128)),
    (get_format("int4", 32), get_format("int4", CHANNEL)),
]


@pytest.mark.parametrize(("attention", "experts"), MIXTURES)
def test_mixed_gptq_is_dynamic(attention, experts):
    quant = mixed(attention, experts)
    config = through_json(GPTQ.quantization_config(quant))
    assert (config["bits"], config["group_size"]) == (experts.bits, experts.group_size)
    (changed,) = (v for k, v in config["dynamic"].items() if k.startswith("+:"))
    assert changed == {"bits": attention.bits, "group_size": attention.group_size, "sym": True}
    assert GPTQ.read_config(config, NAMES) == formats_of(quant)


@pytest.mark.parametrize(("attention", "experts"), MIXTURES)
def test_mixed_auto_round_is_extra(attention, experts):
    quant = mixed(attention, experts)
    config = through_json(ROUND.quantization_config(quant))
    assert set(config["extra_config"]) == {*ATTENTION, ROUTER}
    assert ROUND.read_config(config, NAMES) == formats_of(quant)


# What others write


def test_gptq_of_version_2_and_bare_rules_are_read():
    config = {
        "bits": 4,
        "group_size": 128,
        "sym": False,
        "checkpoint_format": "gptq_v2",
        "dynamic": {r".*q_proj": {"group_size": 32}, r"-:.*mlp\.gate$": None},
    }
    found = GPTQ.read_config(config, ("a.q_proj", "a.mlp.gate", "a.mlp.up", "lm_head"))
    assert {n: f.weights.group_size for n, f in found.items()} == {"a.q_proj": 32, "a.mlp.up": 128}
    fmt = found["a.mlp.up"].weights
    assert fmt == get_format("int4_asym")
    zeros = next(s for s in GPTQ.variant(config).stored(fmt, None) if s.suffix == "qzeros")
    assert zeros.to_disk(torch.full((8, 1), 8, dtype=torch.uint8)).item() == -0x77777778
    symmetric = GPTQ.variant(config).stored(get_format("int4"), None)[1]
    assert symmetric.to_disk(torch.tensor((8, 128))).item() == -0x77777778


def test_quantized_lm_head_is_read():
    config = {"bits": 4, "group_size": 128, "sym": True}
    assert not GPTQ.read_config(config, ("lm_head",))
    assert GPTQ.read_config(config | {"lm_head": True}, ("lm_head",))


def test_auto_rounds_own_config_is_read():
    config = {
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "block_name_to_quantize": ["model.layers"],
        "extra_config": {
            ".mlp.gate": {"bits": 16},
            "model.layers.0.a": {"bits": 8, "group_size": 32},
            r"model\.layers\.\d+\.b": {"group_size": 64},
            "lm_head": {"bits": 4, "group_size": 128},
        },
    }
    names = [f"model.layers.0.{n}" for n in ("a", "b", "c", "mlp.gate")]
    found = ROUND.read_config(config, (*names, "visual.a", "lm_head"))
    read = {n: (f.weights.name, f.weights.group_size) for n, f in found.items()}
    assert read == {
        names[0]: ("int8_group", 32),
        names[1]: ("int4", 64),
        names[2]: ("int4", 128),
        "lm_head": ("int4", 128),
    }
    assert ROUND.variant(config).packing == "auto_round:auto_gptq"


@pytest.mark.parametrize(
    ("dialect", "config", "message"),
    [
        (GPTQ, {"bits": 3, "group_size": 128}, "bits=3 with sym=True is not read"),
        (GPTQ, {"bits": 2, "group_size": 128, "sym": False}, "bits=2 with sym=False"),
        (GPTQ, {"bits": 4, "group_size": 48}, "group_size 48"),
        (GPTQ, {"bits": 4, "group_size": 32, "dynamic": {"+:(": {}}}, "no regular expression"),
        (AWQ, {"bits": 4, "group_size": 128, "version": "gemv"}, "'gemv' with bits=4"),
        (AWQ, {"bits": 8, "group_size": 128}, "with bits=8"),
        (ROUND, {"bits": 2, "group_size": 128}, "bits=2"),
        (
            ROUND,
            {"bits": 4, "packing_format": "auto_round:llm_compressor", "data_type": "nv_fp"},
            "data_type='nv_fp'",
        ),
    ],
)
def test_configs_that_are_not_read(dialect, config, message):
    with pytest.raises(CheckpointError, match=message):
        dialect.read_config(config, ("a",))


@pytest.mark.parametrize(
    ("dialect", "config", "message"),
    [
        (GPTQ, {"checkpoint_format": "marlin"}, "'marlin' is not read; known: gptq, gptq_v2"),
        (ROUND, {"packing_format": "auto_round:fp8"}, "'auto_round:fp8' is not read"),
    ],
)
def test_packings_that_are_not_read(dialect, config, message):
    with pytest.raises(CheckpointError, match=message):
        dialect.variant(config)


# What is refused


@pytest.mark.parametrize(
    ("dialect", "weights", "inputs"),
    [
        (GPTQ, "fp8", "fp8"),
        (GPTQ, "int4", "fp8"),
        (AWQ, "int8_group", None),
        (AWQ, "int4", "fp8"),
        (ROUND, "nvfp4", "nvfp4"),
        (ROUND, "mxfp8", "mxfp4"),
        (ROUND, "int4", "fp8"),
    ],
)
def test_formats_that_are_refused(dialect, weights, inputs):
    message = rf"{dialect.name} export has no {weights}.*export compressed-tensors"
    with pytest.raises(FormatError, match=message):
        dialect.stored(get_format(weights), get_format(inputs) if inputs else None)


def test_asymmetric_gptq_is_refused():
    with pytest.raises(FormatError, match="take int4, or export awq, auto-round or compressed"):
        GPTQ.quantization_config(exported.plan("int4_asym"))


def test_mixtures_that_are_refused():
    int4, asym = get_format("int4"), get_format("int4_asym")
    with pytest.raises(FormatError, match=r"int4_asym.*awq checkpoint has one format"):
        AWQ.quantization_config(mixed(int4, asym))
    with pytest.raises(FormatError, match="auto-round packs a checkpoint in one way"):
        ROUND.quantization_config(mixed(int4, asym))
    with pytest.raises(FormatError, match="auto-round reads one microscaling format"):
        ROUND.quantization_config(mixed(get_format("mxfp4"), get_format("mxfp8")))


@pytest.mark.parametrize("dialect", [GPTQ, AWQ, ROUND, get_dialect("fp8")])
def test_kv_cache_is_refused(dialect):
    quant = replace(exported.plan("int4"), kv_cache="fp8")
    assert dialect.cache_scales == ()
    with pytest.raises(FormatError, match="no scales of a fp8 KV cache; export modelopt"):
        dialect.quantization_config(quant)


def test_awq_names_that_are_parts_of_quantized_ones():
    slots = [
        (
            Slot(
                name="fc1.weight", sources=("l.0.mlp.gate_proj", "l.0.mlp.up_proj"), shape=(64, 64)
            ),
            get_format("int4"),
        ),
        (
            Slot(name="router.weight", sources=("l.0.mlp.gate",), shape=(4, 64), fixed="router"),
            None,
        ),
    ]
    quant = QuantPlan("test", tuple(Decision(slot=s, rule="test", weights=fmt) for s, fmt in slots))
    with pytest.raises(FormatError, match=r"leave quantized l\.0\.mlp\.gate_proj unquantized"):
        AWQ.quantization_config(quant)
    GPTQ.quantization_config(quant)
