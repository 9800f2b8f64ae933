from .attach import attach_model as attach_model
from .evaluation import Reference as Reference
from .evaluation import evaluate_model as evaluate_model
from .keep import keep_scales as keep_scales
from .load import LiveModel as LiveModel
from .load import empty_model as empty_model
from .load import fill_model as fill_model
from .load import load_model as load_model
from .load import wrap_model as wrap_model
from .locate import LocalParam as LocalParam
from .locate import local_params as local_params
from .parallel import start_distributed as start_distributed
from .schedule import check_shares as check_shares
from .schedule import own_share as own_share
from .schedule import run_backward as run_backward
from .schedule import run_schedule as run_schedule
from .schedule import run_through as run_through
from .schedule import whole as whole
from .settings import check_said as check_said

__all__ = [
    "LiveModel",
    "LocalParam",
    "Reference",
    "attach_model",
    "check_said",
    "check_shares",
    "empty_model",
    "evaluate_model",
    "fill_model",
    "keep_scales",
    "load_model",
    "local_params",
    "own_share",
    "run_backward",
    "run_schedule",
    "run_through",
    "start_distributed",
    "whole",
    "wrap_model",
]
