from .facts import ENGINES as ENGINES
from .family_obstacles import Obstacle as Obstacle
from .serving import check_serving as check_serving
from .serving import obstacle as obstacle

__all__ = ["ENGINES", "Obstacle", "check_serving", "obstacle"]
