from .choose import Loops as Loops
from .choose import loops_for as loops_for

__all__ = ["Loops", "loops_for"]
