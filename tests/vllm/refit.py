"""Generate, take new weights from a pipe, and generate again; under vLLM's own Python.

    python refit.py DIR '[token ids]' OUT.json FIFO

FIFO brings tensors as :func:`send` writes them. OUT.json gets the results of both generations, each
as serve.py writes its own.
"""

import json
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.torch import load, save

_LENGTH = struct.Struct("<Q")


def send(tensors: Iterable[tuple[str, Any]], pipe: BinaryIO) -> None:
    """Write each tensor as a safetensors file of its own, after its length."""
    for name, tensor in tensors:
        data = save({name: tensor.contiguous()})
        pipe.write(_LENGTH.pack(len(data)))
        pipe.write(data)


def received(pipe: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Yield what :func:`send` writes, as it comes."""
    while length := pipe.read(_LENGTH.size):
        yield from load(pipe.read(*_LENGTH.unpack(length))).items()


def main() -> None:
    from serve import generated, started

    directory, prompt = sys.argv[1], json.loads(sys.argv[2])
    llm = started(directory)
    found = [generated(llm, prompt)]
    with open(sys.argv[4], "rb") as pipe:
        tensors = received(pipe)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
    llm.reset_prefix_cache()
    found.append(generated(llm, prompt))
    Path(sys.argv[3]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
