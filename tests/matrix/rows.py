"""The versions that are tested together, and their tests."""

from dataclasses import dataclass

CORE, MODELOPT, TE = "0.16.1", "0.47.0", "2.20.2"

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
    """An environment: Python's version, and those of three libraries by distribution name."""

    name: str
    python: str
    te: str = TE
    core: str = CORE
    modelopt: str = MODELOPT
    compiled: bool = False

    @property
    def versions(self) -> dict[str, str]:
        return {
            "transformer_engine": self.te,
            "megatron-core": self.core,
            "nvidia-modelopt": self.modelopt,
        }


ROWS = (
    Row("oldest", "3.11", te="2.10.0", modelopt="0.46.0"),
    Row("te-2.10", "3.11", te="2.10.0"),
    Row("te-2.13", "3.11", te="2.13.0"),
    Row("te-2.16", "3.11", te="2.16.1"),
    Row("te-2.17", "3.11", te="2.17.1"),
    Row("modelopt-0.46", "3.11", modelopt="0.46.0"),
    Row("te-2.20", "3.11"),
    Row("newest", "3.12", core="0.19.2"),
    Row("compiled", "3.12", core="0.19.2", compiled=True),
)
