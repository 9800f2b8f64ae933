"""TensorBoard's event files, written as they are defined: no package of TensorBoard is needed.

An event file is a row of records: length, its checksum, data, its checksum. The data is an
``Event`` message of protocol buffers. Sources: tensorflow/core/lib/io/record_writer.h,
event.proto, summary.proto.
"""

import os
import socket
import struct
import time
from pathlib import Path

from megatron_quant.documents import write_bytes
from megatron_quant.report.facts import Facts
from megatron_quant.report.figures import metrics, params, series

_POLYNOMIAL = 0x82F63B78  # of CRC-32C, reversed
_MASK = 0xA282EAD8
_VERSION = "brain.Event:2"
_STRING = 7  # DT_STRING


def write_events(directory: Path, facts: Facts) -> Path:
    """Write the facts of a run as a new event file, and return its path.

    Metrics have step 0; series have their layer or position as the step; parameters are a text.

    Raises:
        QuantError: For what the disk refuses.
    """
    now = time.time()
    values = [(0, scalar(name, value)) for name, value in metrics(facts).items()]
    values += [
        (step, scalar(name, value))
        for name, steps in series(facts).items()
        for step, value in sorted(steps.items())
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in params(facts).items())
    values.append((0, text("parameters", f"| name | value |\n|---|---|\n{table}\n")))
    events = [_event(now, 0, _field(3, _VERSION.encode()))]
    events += [_event(now, step, _field(5, _field(1, value))) for step, value in values]
    path = directory / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
    write_bytes(path, b"".join(map(record, events)))
    return path


def record(data: bytes) -> bytes:
    """Return a record of an event file."""
    length = struct.pack("<Q", len(data))
    return length + _checked(length) + data + _checked(data)


def scalar(name: str, value: float) -> bytes:
    """Return a value of a summary: a number."""
    return _field(1, name.encode()) + b"\x15" + struct.pack("<f", value)


def text(name: str, content: str) -> bytes:
    """Return a value of a summary: Markdown for TensorBoard's text plugin."""
    plugin = _field(9, _field(1, _field(1, b"text")))
    shape = _field(2, _field(2, b"\x08\x01"))
    tensor = _field(8, bytes((0x08, _STRING)) + shape + _field(8, content.encode()))
    return _field(1, name.encode()) + tensor + plugin


def _event(wall_time: float, step: int, what: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", wall_time) + b"\x10" + _varint(step) + what


def _field(number: int, data: bytes) -> bytes:
    """Return a field of bytes, a string or a message."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))


def _table() -> list[int]:
    found = list(range(256))
    for _ in range(8):
        found = [c >> 1 ^ (_POLYNOMIAL if c & 1 else 0) for c in found]
    return found


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of ``data``."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _checked(data: bytes) -> bytes:
    crc = crc32c(data)
    masked = (crc >> 15 | crc << 17) + _MASK
    return struct.pack("<I", masked & 0xFFFFFFFF)
