"""The inner loops of the codecs in C, where the package was built with them.

Every function gives the bits of the torch code that it replaces, for the tensors that
``formats.backends.loops_for`` hands to it. The library is optional: a host without a compiler has
none, and ``MEGATRON_QUANT_NATIVE=0`` in the environment turns it off. It is plain C over pointers,
so it is tied to no version of torch, and ctypes releases the GIL while it runs.

Blocks lie along the columns of contiguous rows [R, K]: ``block`` columns each, ``first`` of the
first one before column 0.
"""

import ctypes
import faulthandler
import logging
import os
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import fsum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_quant.native.elements import STORED, CElement, Code, in_byte
from megatron_quant.native.spans import Cuts

_VERSION = 3
"""Version of the signatures, equal to ``mq_version`` in csrc. A stale build is not called."""
_FILE = Path(__file__).with_name("_native" + str(sysconfig.get_config_var("EXT_SUFFIX")))
_DIGEST_BYTES = 32
_SHARE = 1 << 17
"""Elements that deserve a thread: 50 microseconds of work, 20 to hand it out."""


Steps = tuple[Tensor, Tensor | None]
_INFINITE = {
    torch.bfloat16: ctypes.c_uint16(0x7F80),
    torch.float16: ctypes.c_uint16(0x7C00),
    torch.float32: ctypes.c_uint32(0x7F800000),
}


class _Blocks(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("first", ctypes.c_int64),
    )


class _Scales(ctypes.Structure):
    _fields_ = (
        ("step", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
    )


class _Leaves(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("nbytes", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("ends", ctypes.c_int64),
    )


@cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("MEGATRON_QUANT_NATIVE") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_FILE))
        version = library.mq_version()
    except (OSError, AttributeError) as error:
        logging.getLogger(__name__).debug("the codecs run in torch alone: %s", error)
        return None
    if version != _VERSION:
        logging.getLogger(__name__).debug("the codecs run in torch alone: %s is stale", _FILE)
        return None
    return library


def available() -> bool:
    """Return whether the functions below can run: the library was built and is not turned off."""
    return _library() is not None


@cache
def explain_lost_pages() -> None:
    """Have SIGBUS, which reading beyond a file's new end is, say so before it ends the process.

    Where there is no library Python says where it was. Others' handlers stay.
    """
    explain = getattr(_library(), "mq_explain_lost_pages", None)
    if explain is not None:
        explain()
    elif not faulthandler.is_enabled():
        faulthandler.enable()


def block_amax(x_RK: Tensor, block: int, first: int = 0) -> Tensor:
    """Return max |x| of each block as fp32 [R, B]; NaN and Inf propagate."""
    out_RB = x_RK.new_empty(x_RK.shape[0], _count(x_RK, block, first), dtype=torch.float32)
    _over_rows(x_RK, lambda lib, r: lib.mq_amax(_blocks(x_RK[r], block, first), _at(out_RB[r])))
    return out_RB


def block_ends(x_RK: Tensor, block: int, first: int = 0) -> Tensor:
    """Return (max(x, 0), max(-x, 0)) of each block as fp32 [R, B, 2]. A NaN reaches one or both."""
    out_RB2 = x_RK.new_empty(x_RK.shape[0], _count(x_RK, block, first), 2, dtype=torch.float32)
    _over_rows(x_RK, lambda lib, r: lib.mq_ends(_blocks(x_RK[r], block, first), _at(out_RB2[r])))
    return out_RB2


def encode(x_RK: Tensor, steps: Steps, element: CElement, columns: Cuts) -> Tensor:
    """Return x / step (+ zero) as stored elements [R, K / packed].

    Args:
        x_RK: bf16 values, contiguous.
        steps: Step of each block, fp32 [R, B], and its zero point where elements have one.
        element: Rounding and packing.
        columns: How blocks lie along K.
    """
    rows, cols = x_RK.shape
    out = x_RK.new_empty(rows, cols // in_byte(element), dtype=torch.uint8)

    def call(lib: ctypes.CDLL, r: slice) -> None:
        scales = _scales(*steps, r)
        blocks = _blocks(x_RK[r], columns.block, columns.first)
        lib.mq_encode(blocks, scales, int(element), _at(out[r]))

    _over_rows(x_RK, call)
    return out.view(STORED[element])


def fake_quant(x_RK: Tensor, steps: Steps, element: CElement, columns: Cuts) -> Tensor:
    """Return the values that ``encode`` stores, (element - zero) * step, as bf16 [R, K]."""
    out_RK = torch.empty_like(x_RK)

    def call(lib: ctypes.CDLL, r: slice) -> None:
        scales = _scales(*steps, r)
        blocks = _blocks(x_RK[r], columns.block, columns.first)
        lib.mq_fake_quant(blocks, scales, int(element), _at(out_RK[r]))

    _over_rows(x_RK, call)
    return out_RK


def nvfp4_encode(x_RK: Tensor, dscale_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Encode values by their tensors' scales: uint8 [R, K/2], and block scales e4m3 [R, K/16]."""
    rows, cols = x_RK.shape
    out, scale = (x_RK.new_empty(rows, cols // n, dtype=torch.uint8) for n in (2, 16))

    def call(lib: ctypes.CDLL, r: slice) -> None:
        dscale = _scales(dscale_R1, None, r)
        lib.mq_nvfp4_encode(_blocks(x_RK[r], 16, 0), dscale, _at(scale[r]), _at(out[r]))

    _over_rows(x_RK, call)
    return out, scale.view(torch.float8_e4m3fn)


def nvfp4_fake_quant(x_RK: Tensor, dscale_R1: Tensor) -> Tensor:
    """Return the values that ``nvfp4_encode`` stores, bf16 [R, K]."""
    out_RK = torch.empty_like(x_RK)

    def call(lib: ctypes.CDLL, r: slice) -> None:
        dscale = _scales(dscale_R1, None, r)
        lib.mq_nvfp4_fake_quant(_blocks(x_RK[r], 16, 0), dscale, _at(out_RK[r]))

    _over_rows(x_RK, call)
    return out_RK


def reads(stored: Tensor) -> bool:
    """Return whether ``decode`` and ``lost`` take these elements."""
    return stored.device.type == "cpu" and stored.numel() > 0 and available()


def decode(stored: Tensor, steps: Steps, code: Code, columns: Cuts) -> Tensor:
    """Return (element - zero) * step of stored elements [R, K / packed] as fp32 [R, K]."""
    out_RK = stored.new_empty(stored.shape[0], columns.length, dtype=torch.float32)
    bytes_ = _bytes(stored, out_RK, code)

    def call(lib: ctypes.CDLL, r: slice) -> None:
        blocks = _blocks(out_RK[r], columns.block, columns.first)
        lib.mq_decode(blocks, _scales(*steps, r), int(code), _at(bytes_[r]), _at(out_RK[r]))

    _over_rows(out_RK, call)
    return out_RK


def lost(
    x_RK: Tensor, stored: Tensor, steps: Steps, code: Code, columns: Cuts
) -> tuple[float, float]:
    """Return (sum of x^2, sum of (x - decoded)^2) of bf16 or fp32 values and stored elements.

    The differences are rounded to fp32, the sums are in fp64.
    """
    assert x_RK.dtype in (torch.bfloat16, torch.float32), x_RK.dtype
    wide = x_RK.dtype == torch.float32
    bytes_, sums = _bytes(stored, x_RK, code), list[tuple[float, float]]()

    def call(lib: ctypes.CDLL, r: slice) -> None:
        blocks = _blocks(x_RK[r], columns.block, columns.first)
        codes, values = _at(bytes_[r]), _at(x_RK[r]) if wide else None
        own, difference = ctypes.c_double(), ctypes.c_double()
        at = ctypes.byref(own), ctypes.byref(difference)
        lib.mq_lost(blocks, _scales(*steps, r), int(code), codes, values, *at)
        sums.append((own.value, difference.value))

    _over_rows(x_RK, call)
    own, difference = map(fsum, zip(*sums, strict=True))
    return own, difference


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether both are bf16, fp16 or fp32 on a CPU, equal bit for bit, and without NaN.

    Return False without the library too.
    """
    library, dtype = _library(), a.dtype
    if library is None or dtype not in _INFINITE or a.device.type != "cpu":
        return False
    if (dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    if not (a.is_contiguous() and b.is_contiguous()):
        return False
    call = library.mq_same_16 if dtype.itemsize == 2 else library.mq_same_32
    return bool(call(_at(a), _at(b), ctypes.c_int64(a.numel()), _INFINITE[dtype]))


@dataclass(frozen=True)
class Leaves:
    """A message for BLAKE2b's tree mode, or some leaves of one.

    Attributes:
        data: Contiguous bytes.
        first: Number of the first leaf in the message.
        ends: Whether the last leaf is the message's last.
    """

    data: memoryview
    first: int = 0
    ends: bool = True


def blake2b(pieces: Sequence[Leaves], leaf_bytes: int, depth: int, count: int) -> bytes | None:
    """Hash ``count`` nodes of a tree with BLAKE2b-256, several at a time.

    Args:
        pieces: Messages, or runs of their leaves.
        leaf_bytes: Size of every leaf but the last of a message, a multiple of 128.
        depth: 0 for the leaves of the pieces, 1 where each piece is the content of its root.
        count: Number of digests.

    Returns:
        The digests one after another; None without the library, or on a CPU where
        :mod:`hashlib` is as fast.
    """
    library = _library()
    if library is None:
        return None
    arrays = [np.frombuffer(piece.data, np.uint8) for piece in pieces]
    at = (array.__array_interface__["data"][0] for array in arrays)
    messages = (_Leaves * len(pieces))(
        *(_Leaves(a, len(p.data), p.first, p.ends) for a, p in zip(at, pieces, strict=True))
    )
    out = ctypes.create_string_buffer(_DIGEST_BYTES * count)
    numbers = (ctypes.c_int64(n) for n in (len(pieces), leaf_bytes, depth))
    return out.raw if library.mq_blake2b(messages, *numbers, out) else None


def _count(x_RK: Tensor, block: int, first: int) -> int:
    return -(-(first + x_RK.shape[1]) // block)


def _bytes(stored: Tensor, x_RK: Tensor, code: Code) -> Tensor:
    """Return stored elements as bytes; check that ``x_RK`` has the shape of their values."""
    bytes_ = stored.view(torch.uint8)
    rows, cols = x_RK.shape
    in_byte = 2 if code in (Code.E2M1, Code.INT4) else 1
    assert bytes_.shape == (rows, cols // in_byte) and cols % in_byte == 0, (stored.shape, cols)
    return bytes_


def _at(t: Tensor) -> ctypes.c_void_p:
    assert t.is_contiguous(), t.stride()
    return ctypes.c_void_p(t.data_ptr())


def _blocks(x_RK: Tensor, block: int, first: int) -> object:
    assert x_RK.is_contiguous() and 0 <= first < block, (x_RK.stride(), block, first)
    return ctypes.byref(_Blocks(x_RK.data_ptr(), *x_RK.shape, block, first))


def _scales(step_RB: Tensor, zero_RB: Tensor | None, rows: slice) -> object:
    """Return the steps of some rows. Steps that are expanded along the rows stay expanded."""
    step_RB = step_RB[rows]
    assert step_RB.dtype == torch.float32 and (step_RB.shape[1] < 2 or step_RB.stride(1) == 1)
    if zero_RB is None:
        return ctypes.byref(_Scales(step_RB.data_ptr(), None, step_RB.stride(0)))
    zero_RB = zero_RB[rows]
    assert zero_RB.dtype == torch.float32 and zero_RB.stride() == step_RB.stride()
    return ctypes.byref(_Scales(step_RB.data_ptr(), zero_RB.data_ptr(), step_RB.stride(0)))


def _over_rows(x_RK: Tensor, call: Callable[[ctypes.CDLL, slice], None]) -> None:
    """Run ``call`` on all rows, with as many threads as torch has."""
    library = _library()
    assert library is not None
    threads = min(torch.get_num_threads(), x_RK.numel() // _SHARE, x_RK.shape[0])
    if threads < 2:
        call(library, slice(None))
        return
    edges = [x_RK.shape[0] * i // threads for i in range(threads + 1)]
    shares = [slice(*pair) for pair in pairwise(edges)]
    # A forked process has none of its parent's threads: each has its own pool.
    for _ in _pool(torch.get_num_threads(), os.getpid()).map(
        lambda share: call(library, share), shares
    ):
        pass


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="megatron-quant")
