"""Run the tests of Megatron-Bridge, each release in an environment of its own.

    python -m tests.clients                # every release
    python -m tests.clients bridge-0.3.1

An environment is the base environment of its Python (tests/matrix/install.py) with a folder of the
release's packages before it, kept in the same cache. Ends with 0 where every release passed; a
release that could not be tried is named. ``--missing`` says whether that is a failure.
"""

import argparse
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from tests.clients.releases import RELEASES, Release
from tests.matrix.install import ROOT, Installer, NoPythonError, NotInstalledError, installed

TESTS = "tests/clients"


def main() -> int:
    arguments = parse()
    installer = Installer(arguments.install_limit)
    ended = {}
    for release in RELEASES:
        if release.name in (arguments.releases or [release.name]):
            ended[release.name] = tried(release, installer, arguments.missing == "fail")
    for name, text in ended.items():
        print(f"{name}: {text or 'passed'}")
    return int(any(text and not text.startswith("NOT RUN") for text in ended.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("releases", nargs="*", choices=[[], *(r.name for r in RELEASES)])
    parser.add_argument("--install-limit", type=float, default=3600, help="seconds, all releases")
    parser.add_argument("--missing", choices=["fail", "report"], default="fail")
    return parser.parse_args()


def tried(release: Release, installer: Installer, strict: bool) -> str:
    """What is to be said of a release; nothing where its tests passed."""
    print(f"== {release.name}: Python {release.python}", flush=True)
    try:
        python, folders = environment(release, installer)
    except NoPythonError as e:
        return f"NOT RUN: {e}"
    except NotInstalledError as e:
        return f"failed: {e}" if strict else f"NOT RUN: {e}"
    path = os.pathsep.join(map(str, [ROOT, *folders]))
    values = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", TESTS]
    code = subprocess.run(command, cwd=ROOT, env=values).returncode
    return f"failed: pytest ended with {code}" if code else ""


def environment(release: Release, installer: Installer) -> tuple[Path, list[Path]]:
    """The Python that runs the release, and the folders to put on its PYTHONPATH."""
    base = installer.base(release.python)

    def fill(folder: Path) -> None:
        into = ("install", "--target", folder)
        installer.pip(base, *into, *release.packages)
        own = (f"megatron-bridge=={release.bridge}", f"megatron-core=={release.core}")
        installer.pip(base, *into, "--no-deps", *own, *release.of_torch)

    parts = (release.core, *release.packages, *release.of_torch)
    made_of = sha256("\n".join(parts).encode()).hexdigest()[:8]
    folder = installer.made(f"{release.name}-py{release.python}-{made_of}", fill)
    found = installed(base, [folder], ["megatron-bridge", "megatron-core"])
    if found != {"megatron-bridge": release.bridge, "megatron-core": release.core}:
        raise NotInstalledError(f"the environment has {found}")
    return base, [folder]


if __name__ == "__main__":
    sys.exit(main())
