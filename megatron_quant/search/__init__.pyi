from .ablation import families as families
from .ablation import option_of as option_of
from .backward import Backward as Backward
from .calls import detached as detached
from .calls import first_output as first_output
from .divergence import Change as Change
from .divergence import Divergences as Divergences
from .found import to_recipe as to_recipe
from .found import write_recipe as write_recipe
from .loss import Loss as Loss
from .loss import check_loss as check_loss
from .loss import check_score as check_score
from .loss import next_token_loss as next_token_loss
from .memory import ScoreMemory as ScoreMemory
from .memory import score_memory as score_memory
from .mixtures import check_mixtures as check_mixtures
from .names import COSTS as COSTS
from .names import KV_CACHE as KV_CACHE
from .names import METHODS as METHODS
from .names import NONE as NONE
from .places import Model as Model
from .places import find_problem as find_problem
from .problem import Place as Place
from .problem import Problem as Problem
from .problem import check_bits as check_bits
from .progress import Progress as Progress
from .store import Scored as Scored
from .store import ScoreStore as ScoreStore
from .store import by_place as by_place
from .summary import Choice as Choice
from .weights import Fit as Fit

__all__ = [
    "COSTS",
    "KV_CACHE",
    "METHODS",
    "NONE",
    "Backward",
    "Change",
    "Choice",
    "Divergences",
    "Fit",
    "Loss",
    "Model",
    "Place",
    "Problem",
    "Progress",
    "ScoreMemory",
    "ScoreStore",
    "Scored",
    "by_place",
    "check_bits",
    "check_loss",
    "check_mixtures",
    "check_score",
    "detached",
    "families",
    "find_problem",
    "first_output",
    "next_token_loss",
    "option_of",
    "score_memory",
    "to_recipe",
    "write_recipe",
]
