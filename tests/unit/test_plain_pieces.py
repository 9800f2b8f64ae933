"""The bytes of a training checkpoint's tensors: every form that torch writes, and nothing else."""

import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_quant.errors import CheckpointError
from megatron_quant.mcore.checkpoint.piece_reader import PieceReader
from megatron_quant.mcore.checkpoint.pieces import FilePiece, PiecedTensor
from megatron_quant.mcore.checkpoint.saved_tensor import find_saved
from megatron_quant.mcore.checkpoint.torch_dist import TorchDist

Cut = tuple[tuple[int, ...], tuple[int, ...]]
BEFORE = b"another tensor"
BASE = torch.arange(60, dtype=torch.float32).view(6, 10)
FORMS = {
    "whole": BASE,
    "transposed": BASE.t(),
    "rows and columns of another": BASE[1:4, 2::3],
    "parameter": torch.nn.Parameter(BASE),
    "bf16": BASE.bfloat16(),
    "fp16 vector": BASE[0].half(),
    "scalar": torch.tensor(3.0),
}


def saved(tensor: object) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def put(folder: Path, content: bytes) -> Path:
    file = folder / "__0_0.distcp"
    file.write_bytes(BEFORE + content + b"the next")
    return file


def reader(file: Path, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> PieceReader:
    start = (0,) * len(shape)
    piece = FilePiece(start=start, size=shape, file=file.name, offset=len(BEFORE), nbytes=nbytes)
    return PieceReader(file.parent, {"key": PiecedTensor(dtype, shape, (piece,))})


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_tensor(form: str, tmp_path: Path) -> None:
    tensor = FORMS[form].detach()
    content = saved(FORMS[form])
    file = put(tmp_path, content)
    shape = tuple(tensor.shape)
    found = reader(file, tensor.dtype, shape, len(content)).read("key", (0,) * len(shape), shape)
    assert torch.equal(found, tensor)


class Bad:
    """A pickle that runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.mark}",)


def replaced(content: bytes, name: str, new: bytes, how: int = zipfile.ZIP_STORED) -> bytes:
    """``content``, a zip, whose file ``archive/name`` is ``new``."""
    old, made = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(made, "w", how) as out:
        for info in old.infolist():
            same = not info.filename.endswith(f"/{name}")
            out.writestr(info.filename, old.read(info) if same else new)
    return made.getvalue()


def test_pickles_that_do_more(tmp_path: Path) -> None:
    """No opcode of them is run."""
    mark, whole = tmp_path / "mark", saved(BASE)
    bad = pickle.dumps(Bad(mark), protocol=2)
    hashed = b"\x80\x02}" + b"K\x01" + b"2\x86" * 60 + b"K\x01s."
    for content, words in (
        (saved({"a": BASE}), "no tensor is pickled with EMPTY_DICT"),
        (replaced(whole, "data.pkl", bad), "it names .*system"),
        (replaced(whole, "data.pkl", hashed), "no tensor is pickled with EMPTY_DICT"),
        (replaced(whole, "data.pkl", b"K\x01." * 2000), "larger than one of a tensor"),
        (replaced(whole, "data.pkl", b"K\x01."), "cannot be read at byte 14"),
        (replaced(whole, "data/0", b"\0" * 8), "its shape is larger than what is stored"),
        (replaced(whole, "byteorder", b"big"), "its numbers are big-endian"),
        (replaced(whole, "none", b"", zipfile.ZIP_DEFLATED), "larger than one of a tensor"),
        (whole[:200], "cannot be read at byte 14"),
        (b"", "cannot be read at byte 14"),
    ):
        file = put(tmp_path, content)
        with pytest.raises(CheckpointError, match=words) as caught:
            find_saved(file, len(BEFORE), len(content))
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert not mark.exists()


def test_bytes_that_change(tmp_path: Path) -> None:
    """Of 400 spoiled files each is a tensor of the right shape, or one error."""
    whole, chosen = saved(BASE), random.Random(0)
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(chosen.choice((1, 1, 4))):
            content[chosen.randrange(len(content))] = chosen.randrange(256)
        file = put(tmp_path, bytes(content))
        try:
            found = reader(file, BASE.dtype, (6, 10), len(whole)).read("key", (0, 0), (6, 10))
            assert found.shape == (6, 10) and found.sum() is not None
        except CheckpointError:
            refused += 1
    assert 0 < refused < 400


def test_a_file_that_is_not_as_described(tmp_path: Path) -> None:
    content = saved(BASE)
    file = put(tmp_path, content)
    for dtype, shape in ((torch.bfloat16, (6, 10)), (torch.float32, (10, 6))):
        with pytest.raises(CheckpointError, match=r"key is torch.float32 \[6, 10\] where"):
            reader(file, dtype, shape, len(content)).read("key", (0, 0), shape)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0.distcp cannot be read .*No such file"):
        reader(file, torch.float32, (6, 10), len(content)).read("key", (0, 0), (6, 10))


def cut(folder: Path, tensor: torch.Tensor, boxes: list[Cut]) -> PieceReader:
    """A reader of ``tensor``, of which a file each has the boxes (start and size)."""
    pieces = []
    for number, (start, size) in enumerate(boxes):
        index = tuple(slice(o, o + n) for o, n in zip(start, size, strict=True))
        content = saved(tensor[index].clone())
        (folder / str(number)).write_bytes(content)
        pieces.append(
            FilePiece(start=start, size=size, file=str(number), offset=0, nbytes=len(content))
        )
    shape = tuple(tensor.shape)
    return PieceReader(folder, {"key": PiecedTensor(tensor.dtype, shape, tuple(pieces))})


def test_pieces_of_several_ranks(tmp_path: Path) -> None:
    """Rows and columns cut unevenly, as data parallelism cuts them, in a stack of experts."""
    tensor = torch.arange(3 * 6 * 8, dtype=torch.float32).view(3, 6, 8)
    boxes = [
        ((e, r, c), (1 if e == 2 else 2, rows, columns))
        for e in (0, 2)
        for r, rows in ((0, 1), (1, 5))
        for c, columns in ((0, 3), (3, 5))
    ]
    found = cut(tmp_path, tensor, boxes)
    for start, size in (
        ((0, 0, 0), (1, 6, 8)),
        ((1, 2, 1), (1, 3, 6)),
        ((2, 5, 7), (1, 1, 1)),
        ((2, 1, 3), (1, 5, 5)),
    ):
        index = tuple(slice(o, o + n) for o, n in zip(start, size, strict=True))
        assert torch.equal(found.read("key", start, size), tensor[index])


def test_pieces_that_leave_a_hole(tmp_path: Path) -> None:
    boxes = [((0, 0), (3, 8)), ((2, 0), (3, 8))]  # as many numbers as there are, but row 5 twice
    found = cut(tmp_path, torch.ones(6, 8), boxes)
    with pytest.raises(CheckpointError, match="the pieces of key are not all of it"):
        found.read("key", (5, 0), (1, 8))


def described(**changes: Any) -> TorchDist:
    """A checkpoint of one tensor [4, 2] in two pieces; ``changes`` are fields of the second."""
    fields = {"offsets": (2, 0), "sizes": (2, 2), "file": "a.distcp", "offset": 7, "length": 9}
    fields |= {"dtype": torch.float32, "transform_descriptors": None, "at": (2, 0)} | changes
    chunks = [
        SimpleNamespace(offsets=(0, 0), sizes=(2, 2)),
        SimpleNamespace(offsets=fields["offsets"], sizes=fields["sizes"]),
    ]
    tensor = SimpleNamespace(
        size=(4, 2), chunks=chunks, properties=SimpleNamespace(dtype=fields["dtype"])
    )
    info = SimpleNamespace(
        relative_path=fields["file"],
        offset=fields["offset"],
        length=fields["length"],
        transform_descriptors=fields["transform_descriptors"],
    )
    first = SimpleNamespace(relative_path="b.distcp", offset=0, length=7)
    index = Index("key", (0, 0)), Index("key", fields["at"])
    metadata = SimpleNamespace(
        state_dict_metadata={"key": tensor},
        storage_data=dict(zip(index, (first, info), strict=True)),
    )
    return TorchDist(Path("there"), {"key": (4, 2)}, metadata)


class Index(SimpleNamespace):
    """torch's MetadataIndex."""

    def __init__(self, fqn: object, offset: object) -> None:
        super().__init__(fqn=fqn, offset=offset)

    __hash__ = object.__hash__  # type: ignore[assignment]


def test_what_metadata_says_of_pieces() -> None:
    (found,) = described().tensors(["key"]).values()
    assert [(p.start, p.size, p.file, p.offset, p.nbytes) for p in found.pieces] == [
        ((0, 0), (2, 2), "b.distcp", 0, 7),
        ((2, 0), (2, 2), "a.distcp", 7, 9),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offsets": (3, 0)}, "a piece of key is outside of it"),
        ({"offsets": (0,)}, "a piece of key is outside of it"),
        ({"sizes": (1, 2)}, "the pieces of key are not all of it"),
        ({"sizes": (-1, 2)}, "a shape is no list of whole numbers"),
        ({"at": (1, 0)}, "nothing says where a piece of key is"),
        ({"file": "../a.distcp"}, "which is no file beside it"),
        ({"file": "/etc/passwd"}, "which is no file beside it"),
        ({"file": 3}, "which is no file beside it"),
        ({"offset": -1}, "which is no file beside it"),
        ({"length": True}, "which is no file beside it"),
        ({"dtype": "float32"}, "key has no dtype"),
        ({"transform_descriptors": ["zstd"]}, "key is compressed"),
    ],
)
def test_what_metadata_must_not_say(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        described(**changes).tensors(["key"])
    assert "\n" not in str(caught.value)
