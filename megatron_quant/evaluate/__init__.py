from megatron_quant.evaluate.evaluate import Result, evaluate, read_windows, score
from megatron_quant.evaluate.load import decoded, native

__all__ = ["Result", "decoded", "evaluate", "native", "read_windows", "score"]
