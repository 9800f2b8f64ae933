from . import library as library
from .library import STORED as STORED
from .library import CElement as CElement
from .library import Code as Code
from .library import Leaves as Leaves
from .library import Steps as Steps
from .library import in_byte as in_byte
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
