"""ModelOpt's JSON: the nested form of hf_quant_config.json, the flat one of config.json.

ModelOpt 0.47 writes both (``quant_utils.process_layer_quant_config`` and
``convert_hf_config.convert_hf_quant_config_format``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_quant.ckpt.dialects.base import ModuleFormat
from megatron_quant.ckpt.dialects.common import describe_format, linears, stated
from megatron_quant.ckpt.dialects.expressions import Effort, Wildcard
from megatron_quant.documents import shown
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.fields import Fields
from megatron_quant.formats import CHANNEL, get_format

ALGORITHMS: dict[str, tuple[str, str | None]] = {
    "FP8": ("fp8", "fp8"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_channel", "fp8_channel"),
    "FP8_PB_WO": ("fp8_block", "fp8_group"),
    "NVFP4": ("nvfp4", "nvfp4"),
    "W4A16_NVFP4": ("nvfp4", None),
    "MXFP8": ("mxfp8", "mxfp8"),
    "W4A16_AWQ": ("int4", None),
    "W4A8_AWQ": ("int4", "fp8"),
}
"""``quant_algo`` -> formats of weights and inputs."""
MIXED = "MIXED_PRECISION"
# ModelOpt states no inputs there, but all readers quantize them dynamically.
_ALIASES: dict[tuple[str, str | None], str] = {("fp8_block", None): "FP8_PB_WO"}
_READ_ALIASES = {"FP8_BLOCK_SCALES": "FP8_PB_WO"}
_AWQ = ("W4A16_AWQ", "W4A8_AWQ")
_INSTEAD: dict[tuple[str, str | None], str] = {
    ("fp8", None): "calibrate the inputs too (inputs: fp8)",
    ("fp8_channel", None): "add inputs: fp8_channel",
    ("mxfp8", None): "add inputs: mxfp8",
    ("int4", "fp8_channel"): "take inputs: fp8",
    ("int4_asym", None): "take int4",
    ("int4_asym", "fp8"): "take int4",
    ("mxfp4", None): "take nvfp4",
    ("mxfp4", "mxfp4"): "take nvfp4",
}
# Readers look for this producer to know the convention, whoever wrote the files.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_KV_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}
# Algorithms that get a group in the flat form.
_GROUPED = ("FP8", "NVFP4", "W4A16_NVFP4", *_AWQ)


def algorithm_of(fmt: ModuleFormat) -> str:
    """Return the ``quant_algo``; FormatError where there is none."""
    pair = (fmt.weights.name, fmt.inputs.name if fmt.inputs else None)
    found = next((a for a, formats in ALGORITHMS.items() if formats == pair), None)
    found = found or _ALIASES.get(pair)
    if found is None:
        instead = _INSTEAD.get(pair)
        raise FormatError(
            f"modelopt export has no {describe_format(fmt)}; it writes {', '.join(ALGORITHMS)}: "
            f"{f'{instead}, or ' if instead else ''}export compressed-tensors"
        )
    if found in _AWQ and fmt.weights.group_size == CHANNEL:
        raise FormatError(
            f"{found} has groups, not channels; take a group_size of 128, or export "
            "compressed-tensors"
        )
    return found


def _statement(fmt: ModuleFormat) -> dict[str, Any]:
    """Return the nested form's statement of a layer's format."""
    algorithm = algorithm_of(fmt)
    statement: dict[str, Any] = {"quant_algo": algorithm}
    if fmt.weights.name in ("nvfp4", "mxfp8", "int4"):
        statement["group_size"] = fmt.weights.group_size
    if algorithm in _AWQ:
        statement |= {"has_zero_point": False, "pre_quant_scale": False}
    return statement


def nested(fmt: ModuleFormat, names: list[str], kv_cache: str) -> dict[str, Any]:
    """Return hf_quant_config.json for one format of all layers but ``names``."""
    statement = _statement(fmt)
    rest = {k: v for k, v in statement.items() if k != "quant_algo"}
    quantization = {
        "quant_algo": statement["quant_algo"],
        "kv_cache_quant_algo": _cache_algorithm(kv_cache),
        **rest,
        "exclude_modules": names,
    }
    return {"producer": dict(_PRODUCER), "quantization": quantization}


def nested_mixed(
    formats: Mapping[str, ModuleFormat], excluded: list[str], kv_cache: str
) -> dict[str, Any]:
    """Return hf_quant_config.json for layers that differ; unlisted ones are not quantized.

    Args:
        formats: Module -> its format, of all that is quantized.
        excluded: Patterns of unlisted modules that readers would still take for quantized.
        kv_cache: ``fp8``, or empty.
    """
    quantization: dict[str, Any] = {
        "quant_algo": MIXED,
        "kv_cache_quant_algo": _cache_algorithm(kv_cache),
        "quantized_layers": {module: _statement(fmt) for module, fmt in formats.items()},
        "exclude_modules": excluded,
    }
    return {"producer": dict(_PRODUCER), "quantization": quantization}


def _cache_algorithm(kv_cache: str) -> str | None:
    return "FP8" if kv_cache else None


def flat(form: Mapping[str, Any], formats: Mapping[str, ModuleFormat]) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json that equals the nested ``form``.

    Args:
        form: Content of hf_quant_config.json.
        formats: Hugging Face module -> its format, of all that is quantized.
    """
    quantization = form["quantization"]
    algorithm = quantization["quant_algo"]
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "producer": form["producer"],
        "ignore": quantization["exclude_modules"],
    }
    if algorithm == MIXED:
        config["config_groups"] = _mixed_groups(formats)
        config["quantized_layers"] = quantization["quantized_layers"]
    elif algorithm in _GROUPED:
        group = _group(next(iter(formats.values())))
        config["config_groups"] = {"group_0": {"targets": ["Linear"], **group}}
    if quantization["kv_cache_quant_algo"]:
        config["kv_cache_scheme"] = dict(_KV_SCHEME)
    return config


def _mixed_groups(formats: Mapping[str, ModuleFormat]) -> dict[str, Any]:
    targets: dict[ModuleFormat, list[str]] = {}
    for module, fmt in formats.items():
        targets.setdefault(fmt, []).append(module)
    return {
        f"group_{i}": {"targets": sorted(modules), **_group(fmt)}
        for i, (fmt, modules) in enumerate(targets.items())
    }


def _group(fmt: ModuleFormat) -> dict[str, Any]:
    algorithm = algorithm_of(fmt)
    if algorithm == "FP8_PB_WO":  # ModelOpt repeats nothing but the name
        return {"quant_algo": algorithm}
    size = {"group_size": fmt.weights.group_size} if "group_size" in _statement(fmt) else {}
    kind = "int" if algorithm == "W4A16_AWQ" else "float"
    weights = {"dynamic": False, "num_bits": fmt.weights.bits, "type": kind, **size}
    if fmt.weights.name == "fp8_channel":
        weights["strategy"] = "channel"
    group: dict[str, Any] = {"weights": weights}
    if fmt.inputs:
        inputs = {"dynamic": False, "num_bits": fmt.inputs.bits, "type": "float"}
        group["input_activations"] = inputs | size
    return group


def from_nested(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the statements of the nested form in file ``path`` that :func:`read` needs.

    Raises:
        CheckpointError: Where it has no quantization section.
    """
    quantization = document.get("quantization")
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path} has no quantization section; fetch it again")
    cache = Fields(quantization, str(path)).text("kv_cache_quant_algo")
    return {
        "quant_method": "modelopt",
        "quant_algo": quantization.get("quant_algo"),
        "group_size": quantization.get("group_size"),
        "ignore": quantization.get("exclude_modules"),
        "quantized_layers": quantization.get("quantized_layers"),
        "kv_cache_scheme": dict(_KV_SCHEME) if cache == "FP8" else cache or None,
    }


def statements(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat form's statements that the nested form repeats."""
    said = stated(config)
    algorithm = said.get("quant_algo")
    return {
        "quant_algo": algorithm,
        "group_size": _group_size(said) if algorithm != MIXED else None,
        "exclude_modules": sorted(said.texts("ignore")),
        "quantized_layers": config.get("quantized_layers"),
        "kv_cache_quant_algo": "FP8" if config.get("kv_cache_scheme") else None,
    }


def nested_statements(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested form's statements, in the keys of :func:`statements`."""
    said = Fields(quantization, "quantization")
    algorithm = said.text("quant_algo")
    repeated = algorithm.upper() in _GROUPED
    return {
        "quant_algo": algorithm,
        "group_size": quantization.get("group_size") if repeated else None,
        "exclude_modules": sorted(said.texts("exclude_modules")),
        "quantized_layers": quantization.get("quantized_layers"),
        "kv_cache_quant_algo": quantization.get("kv_cache_quant_algo"),
    }


def read(config: Mapping[str, Any], modules: tuple[str, ...]) -> dict[str, ModuleFormat]:
    """Return those of ``modules`` that the flat form quantizes.

    CheckpointError for unknown ones.
    """
    said, effort = stated(config), Effort()
    algorithm = said.text("quant_algo")
    if algorithm.upper() == MIXED:
        listed = said.parts("quantized_layers")
        layers = {m: listed[m] for m in modules if m in listed}
        return {
            m: _read_layer(layer.text("quant_algo"), layer.whole("group_size"))
            for m, layer in layers.items()
        }
    fmt = _read_layer(algorithm, _group_size(said))
    ignore = said.texts("ignore")
    exact, wildcards = set(ignore), [Wildcard(n, effort) for n in ignore if "*" in n]
    return {
        m: fmt
        for m in linears(modules)
        if m not in exact and not any(w.match(m) for w in wildcards)
    }


def _read_layer(said: str, group_size: int | None) -> ModuleFormat:
    algorithm = _READ_ALIASES.get(said.upper(), said.upper())
    if algorithm not in ALGORITHMS:
        raise CheckpointError(
            f"modelopt quant_algo {shown(said)} is not read; "
            f"known: {', '.join([*ALGORITHMS, MIXED])}"
        )
    weights, inputs = ALGORITHMS[algorithm]
    try:
        stored = get_format(weights, group_size)
    except FormatError as error:
        raise CheckpointError(f"quantization_config: {error}") from None
    return ModuleFormat(stored, get_format(inputs) if inputs else None)


def _group_size(config: Fields) -> int | None:
    """Return the group size of the weights that the config states; None where it does not."""
    for group in config.parts("config_groups").values():
        return group.part("weights").whole("group_size")
    return config.whole("group_size")


def read_kv_cache(config: Mapping[str, Any]) -> str:
    """Return ``fp8`` where the flat form has that cache; CheckpointError for another one."""
    scheme = config.get("kv_cache_scheme")
    if not scheme:
        return ""
    if isinstance(scheme, dict) and (scheme.get("num_bits"), scheme.get("type")) == (8, "float"):
        return "fp8"
    raise CheckpointError(f"quantization_config: kv_cache_scheme {shown(scheme)} is not read")
