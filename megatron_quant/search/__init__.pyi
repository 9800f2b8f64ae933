from .found import to_recipe as to_recipe
from .found import write_recipe as write_recipe
from .mixtures import check_mixtures as check_mixtures
from .places import Model as Model
from .places import find_problem as find_problem
from .problem import Problem as Problem

__all__ = [
    "Model",
    "Problem",
    "check_mixtures",
    "find_problem",
    "to_recipe",
    "write_recipe",
]
