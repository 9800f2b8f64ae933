"""What a dialect stores of each format, listed once for all modules that have it."""

from megatron_quant.ckpt.dialects.base import Dialect, Layer, ModuleFormat, Stored


class StoredBy:
    """The tensors of ``dialect`` by format. A checkpoint has few formats, and many modules."""

    def __init__(self, dialect: Dialect):
        """Nothing is listed yet."""
        self._dialect = dialect
        self._formats: dict[ModuleFormat, ModuleFormat] = {}
        self._found: dict[tuple[int, Layer], tuple[Stored, ...]] = {}

    def shared(self, fmt: ModuleFormat) -> ModuleFormat:
        """The one object for all formats that are equal to ``fmt``."""
        return self._formats.setdefault(fmt, fmt)

    def of(self, shared: ModuleFormat, layer: Layer) -> tuple[Stored, ...]:
        """As ``Dialect.stored``, of what :meth:`shared` gave."""
        key = (id(shared), layer)  # a hash of all that a format says costs more than the list
        found = self._found.get(key)
        if found is None:
            found = self._dialect.stored(shared.weights, shared.inputs, layer)
            self._found[key] = found
        return found
