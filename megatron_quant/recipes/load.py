"""Load recipes: from the shipped files, a user's YAML file, or a ModelOpt preset."""

import re
from pathlib import Path

from megatron_quant.documents import RECIPE, parse_yaml, read_bytes
from megatron_quant.errors import RecipeError
from megatron_quant.recipes.parse import parse_recipe
from megatron_quant.recipes.schema import Recipe

_CONFIGS = Path(__file__).parent.parent / "configs"
_FAMILIES = _CONFIGS / "families"
_PRESET = re.compile(r"[A-Z0-9_]+_(CFG|CONFIG)(\+[A-Z0-9_]+_(CFG|CONFIG))?")


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes for any model, sorted."""
    return sorted(path.stem for path in _CONFIGS.glob("*.yaml"))


def family_recipe_names() -> list[str]:
    """Return the names of the shipped recipes for one family of models each, sorted."""
    return sorted(path.stem for path in _FAMILIES.glob("*.yaml"))


def is_preset(name_or_path: str) -> bool:
    """Return whether :func:`load_recipe` asks ModelOpt for the recipe, and so imports ModelOpt."""
    if name_or_path in (*recipe_names(), *family_recipe_names()):
        return False
    path = Path(name_or_path)
    is_path = path.suffix in (".yaml", ".yml") or path.is_file()
    return not is_path and _PRESET.fullmatch(name_or_path) is not None


def load_recipe(name_or_path: str | Path | Recipe) -> Recipe:
    """Load the recipe called ``name_or_path``; a Recipe is returned as it is.

    Args:
        name_or_path: A shipped name (``nvfp4``), the path of a YAML file, or the name of a ModelOpt
            preset (``NVFP4_DEFAULT_CFG``, or ``NVFP4_DEFAULT_CFG+FP8_KV_CFG`` with one for the KV
            cache). Only a preset imports ModelOpt.

    Raises:
        RecipeError: For any other string (the message lists the choices), and for a recipe that is
            malformed.
    """
    if isinstance(name_or_path, Recipe):
        return name_or_path
    name_or_path = str(name_or_path)
    if name_or_path in recipe_names():
        return _load_file(name_or_path, _CONFIGS / f"{name_or_path}.yaml")
    if name_or_path in family_recipe_names():
        return _load_file(name_or_path, _FAMILIES / f"{name_or_path}.yaml")
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _load_file(name_or_path, path)
    if is_preset(name_or_path):
        from megatron_quant.recipes import modelopt_presets

        return modelopt_presets.load_preset(name_or_path)
    raise RecipeError(
        f"unknown quantization config {name_or_path!r}; choose one of {', '.join(recipe_names())}, "
        f"for one family of models one of {', '.join(family_recipe_names())}, "
        "the path of a .yaml file, or a ModelOpt preset such as NVFP4_DEFAULT_CFG"
    )


def _load_file(name: str, path: Path) -> Recipe:
    try:
        content = read_bytes(path, RECIPE, RecipeError)
    except RecipeError as e:
        raise RecipeError(
            f"cannot read recipe: {e}; give the path of a .yaml file, or one of "
            f"{', '.join(recipe_names())}"
        ) from None
    return parse_recipe(name, parse_yaml(content, f"recipe {name!r}", RecipeError))
