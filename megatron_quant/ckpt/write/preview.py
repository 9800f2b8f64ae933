"""Show an export as it will look, before its files have their own names.

It makes a directory of symbolic links in the host's temporary space. Any reader of checkpoints then
sees the export as published, and the export's own file system needs no links.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from megatron_quant.ckpt.storage import explained
from megatron_quant.ckpt.write.unfinished import partial


class Preview:
    """Links with the final ``names`` to the files of ``directory``; they lie in ``path``."""

    def __init__(self, directory: Path, names: Iterable[str]) -> None:
        """Make the links. Raises ExportError if the host's temporary space takes none."""
        with explained(Path(tempfile.gettempdir()), "cannot hold links (TMPDIR)"):
            self.path = Path(tempfile.mkdtemp(prefix="megatron-quant-"))
            for name in names:
                link = self.path / name
                link.parent.mkdir(parents=True, exist_ok=True)
                os.symlink(partial(directory.absolute(), name), link)

    def close(self) -> None:
        """Remove the links, not the files."""
        shutil.rmtree(self.path, ignore_errors=True)
