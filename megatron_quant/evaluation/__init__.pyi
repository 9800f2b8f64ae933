from .kv_cache import RoundedCache as RoundedCache
from .kv_cache import round_cached as round_cached
from .load import decoded as decoded
from .load import empty_model as empty_model
from .load import native as native
from .measure import Result as Result
from .measure import Text as Text
from .measure import evaluate as evaluate
from .measure import read_windows as read_windows
from .metrics import NOTHING as NOTHING
from .metrics import Sums as Sums
from .metrics import nll_and_kl as nll_and_kl
from .parts import Part as Part
from .tokenizer import TokenizerChoice as TokenizerChoice
from .tokenizer import load_tokenizer as load_tokenizer

__all__ = [
    "NOTHING",
    "Part",
    "Result",
    "RoundedCache",
    "Sums",
    "Text",
    "TokenizerChoice",
    "decoded",
    "empty_model",
    "evaluate",
    "load_tokenizer",
    "native",
    "nll_and_kl",
    "read_windows",
    "round_cached",
]
