"""How tensor parallelism cuts a parameter: slices of Hugging Face tensors, both directions."""

from collections.abc import Iterator

from megatron_quant.errors import LayoutError
from megatron_quant.models.config import Config
from megatron_quant.models.registry import lookup
from megatron_quant.models.spec import Box, Copy, Domain, Parallel, Param, Role, Rows, Source

_FLAGS = {Domain.DENSE: "--tp", Domain.EXPERT: "--etp"}


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Return the rows of the embedding: the least multiple of ``tp`` not below ``vocab_size``."""
    return -(-vocab_size // tp) * tp


def _require(flag: str, size: int, count: int, what: str) -> None:
    """Raise LayoutError unless ``size``, the value of ``flag``, divides ``count``."""
    if size < 1:
        raise LayoutError(f"{flag} is {size}: give at least 1")
    if count % size:
        choices = ", ".join(str(n) for n in range(1, min(count, 64) + 1) if count % n == 0)
        raise LayoutError(f"{flag} {size} does not divide {what} ({count}); use one of {choices}")


def check_context(hf_config: Config, cp: int) -> None:
    """Raise LayoutError unless ``cp`` ranks can share a sequence of the model."""
    architecture = lookup(hf_config)
    if cp > 1 and architecture.decoder(hf_config).delta is not None:
        raise LayoutError(
            f"--cp {cp}: a gated delta net of {architecture.name} goes through a sequence from its "
            "beginning, on one rank; leave it at 1 and raise --tp"
        )


def check_layout(hf_config: Config, tp: int, ep: int, etp: int) -> None:
    """Raise LayoutError unless the model can be cut over ``tp``, ``ep`` and ``etp`` ranks."""
    architecture = lookup(hf_config)
    decoder = architecture.decoder(hf_config)
    _require("--tp", tp, decoder.heads, "the attention heads")
    if decoder.delta is not None:
        _require("--tp", tp, decoder.delta.key_heads, "the key heads of linear attention")
    if decoder.hybrid is not None:
        _require("--tp", tp, decoder.hybrid.groups, "the groups of Mamba's heads")
    _require("--tp", tp, decoder.query_groups, "the key-value heads")
    if decoder.has_dense_mlp:
        _require("--tp", tp, decoder.ffn, "the intermediate size")
    if (experts := decoder.experts) is not None:
        _require("--ep", ep, experts.count, "the experts of a layer")
        _require("--etp", etp, experts.ffn, "the intermediate size of an expert")
        if decoder.biased and etp > 1:  # Megatron-Core asserts it
            raise LayoutError(
                f"--etp {etp}: experts of {architecture.name} have biases, which Megatron-Core "
                "does not cut; leave it at 1 and raise --ep, or use --stream"
            )
        if experts.shared_ffn:
            _require("--tp", tp, experts.shared_ffn, "the intermediate size of the shared expert")
    elif (ep, etp) != (1, 1):
        raise LayoutError(
            f"--ep {ep} --etp {etp}: {architecture.name} has no experts; leave both at 1"
        )


def local_shape(param: Param, rank: int, size: int) -> tuple[int, ...]:
    """Return the shape that shard ``rank`` of ``size`` holds, vocabulary padding included."""
    assert 0 <= rank < size, (param.name, rank, size)
    if param.parallel is Parallel.REPLICATED:
        return param.shape
    if param.parallel is Parallel.ROW:
        _require(_FLAGS[param.domain], size, param.shape[1], f"the columns of {param.name}")
        return (param.shape[0], param.shape[1] // size)
    if param.role in (Role.EMBEDDING, Role.OUTPUT):
        padded = param.padded or padded_vocab(param.shape[0], size)
        return (padded // size, *param.shape[1:])
    for source in param.sources:
        rows = param.groups or source.shape[0]
        what = f"the query groups of {param.name}" if param.groups else f"the rows of {source.name}"
        _require(_FLAGS[param.domain], size, rows, what)
    return (param.shape[0] // size, *param.shape[1:])


def copies(param: Param, rank: int, size: int) -> tuple[Copy, ...]:
    """List the rectangles of Hugging Face tensors that shard ``rank`` of ``size`` holds.

    Rows of vocabulary padding are in no rectangle.

    Args:
        param: The unsharded parameter.
        rank: Rank in the group that cuts it.
        size: Size of that group: tp for the dense domain, etp for the expert one.

    Raises:
        LayoutError: Where ``size`` does not divide the dimension that it cuts.
    """
    shape = local_shape(param, rank, size)
    if param.parallel is Parallel.REPLICATED:
        return (_rows(param.sources[0], 0, 0, shape[0]),)
    if param.parallel is Parallel.ROW:
        (source,) = param.sources
        return (Copy(source, Box((0, rank * shape[1]), shape), Box((0, 0), shape)),)
    if param.role in (Role.EMBEDDING, Role.OUTPUT):
        start = rank * shape[0]
        real = min(shape[0], param.shape[0] - start)
        return (_rows(param.sources[0], start, 0, real),) if real > 0 else ()
    return _interleaved(param, rank, size)


def _interleaved(param: Param, rank: int, size: int) -> tuple[Copy, ...]:
    groups = param.groups or size
    per_rank = groups // size
    own = range(rank * per_rank, (rank + 1) * per_rank)
    items = param.order or tuple(_all_of(i, s, groups) for i, s in enumerate(param.sources))
    if param.by_item:
        cells = [(item, group) for item in items for group in own]
    else:
        cells = [(item, group) for group in own for item in items]
    found: list[Copy] = []
    at = 0
    for item, group in cells:
        start = item.start + group * item.stride
        found.append(_rows(param.sources[item.source], start, at, item.count))
        at += item.count
    return tuple(_joined(found)) if param.order else tuple(found)


def _all_of(number: int, source: Source, groups: int) -> Rows:
    rows = source.shape[0] // groups
    return Rows(source=number, start=0, count=rows, stride=rows)


def _joined(copies: list[Copy]) -> Iterator[Copy]:
    """Join copies of rows that follow one another on both sides."""
    last = copies[0]
    for copy in copies[1:]:
        after = last.src.start[0] + last.src.size[0], last.dst.start[0] + last.dst.size[0]
        if copy.source == last.source and after == (copy.src.start[0], copy.dst.start[0]):
            rows = last.src.size[0] + copy.src.size[0]
            last = _rows(last.source, last.src.start[0], last.dst.start[0], rows)
        else:
            yield last
            last = copy
    yield last


def _rows(source: Source, src: int, dst: int, rows: int) -> Copy:
    rest = source.shape[1:]
    zeros, size = (0,) * len(rest), (rows, *rest)
    return Copy(source, Box((src, *zeros), size), Box((dst, *zeros), size))
