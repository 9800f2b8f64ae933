"""An export as it will look, before its files have their own names.

A directory of symbolic links in the host's own temporary space, so that whatever reads a checkpoint
reads it as it is published, and the file system of the export needs no links.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from megatron_quant.ckpt.storage import explained
from megatron_quant.ckpt.write.unfinished import partial


class Preview:
    """Links by the final ``names`` to the files of ``directory``; ``path`` is where they are."""

    def __init__(self, directory: Path, names: Iterable[str]) -> None:
        """Raise ExportError where the host's temporary space takes no links."""
        with explained(Path(tempfile.gettempdir()), "cannot hold links (TMPDIR)"):
            self.path = Path(tempfile.mkdtemp(prefix="megatron-quant-"))
            for name in names:
                link = self.path / name
                link.parent.mkdir(parents=True, exist_ok=True)
                os.symlink(partial(directory.absolute(), name), link)

    def close(self) -> None:
        """Remove the links; what they lead to stays."""
        shutil.rmtree(self.path, ignore_errors=True)
