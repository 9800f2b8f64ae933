from .factors import fold_place as fold_place
from .factors import sampled_rows as sampled_rows
from .fold import DOCUMENT as DOCUMENT
from .fold import Fold as Fold
from .fold import joined as joined
from .fold import parse_fold as parse_fold
from .places import Place as Place
from .places import Places as Places
from .places import find_places as find_places

__all__ = [
    "DOCUMENT",
    "Fold",
    "Place",
    "Places",
    "find_places",
    "fold_place",
    "joined",
    "parse_fold",
    "sampled_rows",
]
