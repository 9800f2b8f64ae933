"""Environments for the rows, made once and kept under the user's cache folder.

One base environment per Python version holds everything (that of the running interpreter where the
version is the same). The libraries that a row varies are small wheels, laid over it: folders that
come first on PYTHONPATH. So is a compiled Transformer Engine.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

from tests.matrix.rows import Row

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
# Headers that a CUDA toolkit would bring, and what else the build of TE's binding asks for.
_BUILD = (
    *("setuptools", "wheel", "ninja", "pybind11", "packaging"),
    *("nvidia-cuda-crt==13.0.*", "nvidia-cuda-cccl==13.0.*"),
)
_BUILD_ENVIRONMENT = {
    "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
    "NVTE_BUILD_USE_NVIDIA_WHEELS": "1",
    "NVTE_WITH_NCCL_EP": "0",
}
_VERSIONS = (
    "import sys, json; from importlib.metadata import version;"
    "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
)


class NotInstalledError(Exception):
    """A row cannot run here; the text says why."""


class NoPythonError(NotInstalledError):
    """This host has no such Python."""


def cache() -> Path:
    """The folder; MEGATRON_QUANT_CACHE names another."""
    users = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("MEGATRON_QUANT_CACHE", users / "megatron_quant"))


def find_python(version: str) -> str:
    """An interpreter of ``version`` ("3.12"), of the path or of pyenv."""
    pyenv = sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))
    for candidate in (f"python{version}", *map(str, pyenv)):
        if (
            shutil.which(candidate)
            and not subprocess.run(
                [candidate, "-c", "import venv, ensurepip"], capture_output=True
            ).returncode
        ):
            return candidate
    raise NoPythonError(f"this host has no Python {version}")


class Installer:
    """Makes environments; raises NotInstalledError, at the latest when ``limit_s`` are over."""

    def __init__(self, limit_s: float) -> None:
        self._deadline = time.monotonic() + limit_s

    def environment(self, row: Row) -> tuple[Path, list[Path]]:
        """The Python that runs the row, and the folders to put on its PYTHONPATH."""
        base = self.base(row.python)
        folders = [self._compiled(base, row)] if row.compiled else []
        for name, version in row.versions.items():
            if installed(base, folders, [name])[name] != version:
                folders.append(self._overlay(base, row.python, f"{name}=={version}"))
        found = installed(base, folders, list(row.versions))
        if found != row.versions:
            raise NotInstalledError(f"the environment has {found}")
        return base, folders

    def base(self, version: str) -> Path:
        """The Python of the base environment; the running one where its version is the same."""
        if version == f"{sys.version_info.major}.{sys.version_info.minor}":
            return Path(sys.executable)
        interpreter = find_python(version)
        name = f"base-py{version}-{requirements()}"
        return self.made(name, lambda folder: self._fill(folder, interpreter)) / "bin/python"

    def _fill(self, folder: Path, interpreter: str) -> None:
        self._run(interpreter, "-m", "venv", folder)
        python = folder / "bin/python"
        self.pip(python, "install", TORCH)
        self.pip(python, "install", "-c", ROOT / "constraints.txt", f"{ROOT}[cpu,dev]")
        # The rows run the sources.
        self.pip(python, "uninstall", "-y", "megatron-quant")

    def _overlay(self, base: Path, python: str, requirement: str) -> Path:
        # An older transformers needs older libraries of its own, and none of those needs torch.
        alone = () if requirement.startswith("transformers=") else ("--no-deps",)
        return self.made(
            f"{requirement.replace('==', '-')}-py{python}",
            lambda folder: self.pip(base, "install", *alone, "--target", folder, requirement),
        )

    def _compiled(self, base: Path, row: Row) -> Path:
        def fill(folder: Path) -> None:
            names = ("transformer-engine", "transformer-engine-cu13")
            packages = [f"{name}=={row.te}" for name in names] + [self._wheel(base, row)]
            self.pip(base, "install", "--no-deps", "--target", folder, *packages)

        return self.made(f"compiled-te-{row.te}-py{row.python}", fill)

    def _wheel(self, base: Path, row: Row) -> Path:
        """TE's torch binding, built where it is not cached: about ten minutes on two cores."""
        wheels = cache() / "wheels"
        tag = f"cp{row.python.replace('.', '')}"
        pattern = f"transformer_engine_torch-{row.te}*{tag}*.whl"
        if not list(wheels.glob(pattern)):
            self.pip(base, "install", *_BUILD)
            self.pip(
                base,
                *("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", wheels),
                f"transformer-engine-torch=={row.te}",
                environment=_BUILD_ENVIRONMENT | {"MAX_JOBS": os.environ.get("MAX_JOBS", "2")},
            )
        (wheel,) = wheels.glob(pattern)
        return wheel

    def made(self, name: str, fill: Callable[[Path], None]) -> Path:
        """The cached folder ``name``; one that was left half-filled is made anew."""
        folder, ready = cache() / name, cache() / f"{name}.ready"
        if not ready.exists():
            print(f"making {folder}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            fill(folder)
            ready.touch()
        return folder

    def pip(
        self, python: Path, verb: str, *words: object, environment: Mapping[str, str] | None = None
    ) -> None:
        """Run pip in the environment of ``python``."""
        quiet = ("--quiet", "--disable-pip-version-check")
        self._run(python, "-m", "pip", verb, *quiet, *words, environment=environment)

    def _run(self, *words: object, environment: Mapping[str, str] | None = None) -> None:
        command = [str(word) for word in words]
        # An overlay of the caller's is not to be installed into.
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        try:
            subprocess.run(
                command,
                env=clean | dict(environment or {}),
                timeout=max(self._deadline - time.monotonic(), 1),
                check=True,
            )
        except subprocess.TimeoutExpired:
            raise NotInstalledError(f"not installed in time: {' '.join(command)}") from None
        except (subprocess.CalledProcessError, OSError) as e:
            raise NotInstalledError(f"not installed: {e}") from e


def requirements() -> str:
    """What the environments are made of, as a digest: others are made where it changes."""
    files = (ROOT / "setup.py", ROOT / "constraints.txt")
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def installed(python: Path, folders: list[Path], names: list[str]) -> dict[str, str]:
    """Distribution name to the version that ``python`` finds with ``folders`` on its path."""
    path = os.pathsep.join(map(str, folders))
    command = [str(python), "-c", _VERSIONS, *names]
    return json.loads(subprocess.check_output(command, env=os.environ | {"PYTHONPATH": path}))
