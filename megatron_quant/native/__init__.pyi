from . import library as library
from .elements import STORED as STORED
from .elements import CElement as CElement
from .elements import Code as Code
from .elements import in_byte as in_byte
from .library import Leaves as Leaves
from .library import Steps as Steps
from .sizes import WHOLE as WHOLE
from .spans import Cuts as Cuts
from .spans import Origin as Origin

__all__ = [
    "STORED",
    "WHOLE",
    "CElement",
    "Code",
    "Cuts",
    "Leaves",
    "Origin",
    "Steps",
    "in_byte",
    "library",
]
