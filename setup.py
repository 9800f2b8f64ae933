"""Packaging. Settings of the tools (ruff, mypy, pytest) are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent

# What a host brings: torch, Transformer Engine and Megatron are named so that a bare machine gets
# them, and bounded so loosely that an install leaves those of an NGC container as they are.
# Container builds carry versions such as 2.8.0a0+nv25.8, which are *older* than 2.8 to pip: a bound
# ">=2.8" would make it download another torch. Hence no bound on torch (nvidia-modelopt has its
# own) and TE, and for Megatron the last version before every 0.16 one, release candidates
# included. Upper bounds are nowhere, for the same reason.
HOST = ["torch", "transformer-engine", "megatron-core>0.15.99"]

REQUIRED = [
    *HOST,
    "nvidia-modelopt>=0.46",
    "requests",  # nvidia-modelopt 0.47 imports it and does not declare it
    "safetensors>=0.4",
    "lazy_loader>=0.4",  # faces of sub-packages import what is used, when it is used
    "rich",
    "PyYAML>=6.0",
    "regex",  # stops an expression of a checkpoint's config that takes too long
    # Megatron-Bridge 0.3 needs 4.57; eval and calibration under --stream need 5.0
    "transformers>=4.57",
    "tokenizers",
]

EXTRAS = {
    # A host without a GPU. These versions are the ones that megatron_quant/cpu was written for:
    # the transformer-engine wheel here is pure Python, and its import needs the last three.
    "cpu": [
        "torch==2.13.0",
        "transformer-engine==2.20.2",
        "einops==0.8.2",
        "onnxscript==0.7.2",
        "triton==3.7.1",
    ],
    # A CUDA host without its own Transformer Engine: compiles its torch binding. Not for an NGC
    # container, whose TE is built from source and is already complete.
    "cuda": ["transformer-engine[pytorch]"],
    # Calibration texts from the hub.
    "data": ["datasets"],
    "dev": [
        "pytest",
        "ruff",
        "mypy",
        "types-PyYAML",
        "compressed-tensors==0.20.0",
        "accelerate",
    ],
}


# The codecs' inner loops: plain C without headers of Python or torch, loaded with ctypes. Optional:
# without a compiler, or with one that knows not these flags, the install goes on and the codecs run
# in torch. The flags keep every fp32 operation as it is written; none ties the library to the CPU
# that it is built on.
NATIVE = Extension(
    "megatron_quant.native._native",
    sources=sorted(str(p.relative_to(HERE)) for p in HERE.glob("megatron_quant/csrc/*.c")),
    depends=sorted(str(p.relative_to(HERE)) for p in HERE.glob("megatron_quant/csrc/*.h")),
    extra_compile_args=[
        *("-std=c99", "-O3", "-g0"),
        *("-fno-fast-math", "-ffp-contract=off", "-fno-trapping-math"),
    ],
    optional=True,
)


def version() -> str:
    """``__version__`` of the package, read without importing it (torch may not be there yet)."""
    text = (HERE / "megatron_quant" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found, "megatron_quant/__init__.py has no __version__"
    return found.group(1)


setup(
    name="megatron-quant",
    version=version(),
    description="Quantization of Megatron-Core / Transformer Engine models, MoE first",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_quant", "megatron_quant.*"]),
    package_data={
        "megatron_quant": [
            "configs/*.yaml",
            "configs/families/*.yaml",
            "report/*.css",
            "py.typed",
            "*.pyi",
            "**/*.pyi",
        ]
    },
    ext_modules=[NATIVE],
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-quant = megatron_quant.cli.main:main"]},
)
