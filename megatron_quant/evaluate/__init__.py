from megatron_quant.evaluate.evaluate import Result, Text, evaluate, read_windows, score
from megatron_quant.evaluate.load import decoded, native

__all__ = ["Result", "Text", "decoded", "evaluate", "native", "read_windows", "score"]
