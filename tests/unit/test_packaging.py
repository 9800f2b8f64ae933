"""Installs by pip, from a wheel and from a sdist, in their own environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.dist import checkpoints

ROOT = Path(__file__).parents[2]
_ENV = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
_KINDS = ("wheel", "sdist")
_BUILD = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
_RUN = """\
import megatron_quant, sys
from megatron_quant.cli.main import main
from megatron_quant.native import library as native
assert not megatron_quant.__file__.startswith(sys.argv[1]), megatron_quant.__file__
print("C:", native.available())
main(["quantize", "--stream", "--hf-model-id", sys.argv[2], "--export-quant-cfg", "w4a16_nvfp4",
      "--export-dir", sys.argv[3]])
"""


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=_ENV
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The two archives, built from a copy of the sources with nothing else in it."""
    tree, out = tmp_path_factory.mktemp("build") / "tree", tmp_path_factory.mktemp("dist")
    kept_out = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")
    shutil.copytree(ROOT / "megatron_quant", tree / "megatron_quant", ignore=kept_out)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)
    run(sys.executable, "-c", _BUILD, "build_sdist", out, cwd=tree)
    run(sys.executable, "-c", _BUILD, "build_wheel", out, cwd=tree)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def installed(archive: Path, directory: Path) -> Path:
    """The ``bin`` of a fresh environment that has ``archive``, and this one's libraries."""
    venv.create(directory, with_pip=False)
    (site,) = directory.glob("lib/python*/site-packages")
    # Lines of a .pth become paths whose own .pth files are not read, so that an editable install
    # of the package, which is one of those, is not seen from there.
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", directory / "bin" / "python")
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(*pip, "install", *flags, archive, cwd=directory)
    return directory / "bin"


@pytest.mark.parametrize("kind", _KINDS)
def test_an_installed_package_quantizes(kind, built, tmp_path):
    programs = installed(built[kind], tmp_path / "env")
    source = checkpoints.save("qwen3_moe", tmp_path / "source")
    command = ("quantize", "--stream", "--dry-run", "--hf-model-id", source)
    said = run(programs / "megatron-quant", *command, "--export-quant-cfg", "nvfp4", cwd=tmp_path)
    assert "experts" in said
    said = run(programs / "python", "-c", _RUN, ROOT, source, tmp_path / "out", cwd=tmp_path)
    assert "C: True" in said
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_archives_hold_what_the_sources_hold(built):
    own = {
        str(p.relative_to(ROOT))
        for kind in ("*.py", "*.yaml", "*.css", "py.typed")
        for p in (ROOT / "megatron_quant").rglob(kind)
    }
    headers = {str(p.relative_to(ROOT)) for p in (ROOT / "megatron_quant").rglob("*.[ch]")}
    with zipfile.ZipFile(built["wheel"]) as wheel:
        assert own <= set(wheel.namelist())
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
        assert own | headers <= names
