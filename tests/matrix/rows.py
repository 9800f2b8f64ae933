"""The versions that are tested together, and their tests."""

from dataclasses import dataclass

CORE, MODELOPT, TE = "0.16.1", "0.47.0", "2.20.2"
TRANSFORMERS = "5.23.0"  # as constraints.txt

# Layers, calibration and export, at one to four ranks: about a minute.
TESTS = (
    "tests/unit/test_cpu_kernels.py",
    "tests/unit/test_recipes_modelopt.py",
    "tests/unit/test_formats_devices.py",
    "tests/dist/test_cpu_models.py",
    "tests/dist/test_cpu_compiled.py",
    "tests/dist/test_layers_grouped.py",
    "tests/dist/test_layers_model.py",
    "tests/dist/test_layers_modelopt.py",
    "tests/dist/test_calib_amax.py",
    "tests/dist/test_gpu_checks.py",
    "tests/dist/test_live_models.py",
    "tests/dist/test_layouts.py::test_other_architectures",
    "tests/dist/test_exports_read_back.py::test_bytes_are_modelopts_own",
)


@dataclass(frozen=True)
class Row:
    """An environment: Python's version, and those of four libraries by distribution name.

    without: tests that ask for more than the row has.
    """

    name: str
    python: str
    te: str = TE
    core: str = CORE
    modelopt: str = MODELOPT
    transformers: str = TRANSFORMERS
    compiled: bool = False
    without: tuple[str, ...] = ()

    @property
    def versions(self) -> dict[str, str]:
        return {
            "transformer_engine": self.te,
            "megatron-core": self.core,
            "nvidia-modelopt": self.modelopt,
            "transformers": self.transformers,
        }


# Megatron-Bridge 0.3 needs 4.57, whose configs of small models have other keys and limits.
_OF_NEWER_CONFIGS = (
    "tests/dist/test_live_models.py::test_what_does_not_fit_is_refused_before_anything_changes",
    "tests/dist/test_layouts.py::test_other_architectures[qwen2_moe]",
)

ROWS = (
    Row("oldest", "3.11", te="2.10.0", modelopt="0.46.0"),
    Row("te-2.10", "3.11", te="2.10.0"),
    Row("te-2.13", "3.11", te="2.13.0"),
    Row("te-2.16", "3.11", te="2.16.1"),
    Row("te-2.17", "3.11", te="2.17.1"),
    Row("modelopt-0.46", "3.11", modelopt="0.46.0"),
    Row("te-2.20", "3.11"),
    Row("transformers-4.57", "3.11", transformers="4.57.6", without=_OF_NEWER_CONFIGS),
    Row("newest", "3.12", core="0.19.2"),
    Row("compiled", "3.12", core="0.19.2", compiled=True),
)
