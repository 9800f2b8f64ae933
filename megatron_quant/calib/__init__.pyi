from .cache_amax import merge_cache as merge_cache
from .calibration import CalibrationReport as CalibrationReport
from .calibration import ColdExperts as ColdExperts
from .calibration import InputRules as InputRules
from .calibration import calibrate as calibrate
from .calibration import calibrate_weights as calibrate_weights
from .calibration import load_inputs as load_inputs
from .calibration import refresh_weights as refresh_weights
from .calibration_file import AMAX as AMAX
from .calibration_file import MOMENT as MOMENT
from .calibration_file import PEAKS as PEAKS
from .calibration_file import SQUARES as SQUARES
from .calibration_file import CalibrationFile as CalibrationFile
from .calibration_file import Late as Late
from .calibration_file import cache_key as cache_key
from .calibration_file import loaded_amaxes as loaded_amaxes
from .calibration_file import lost_statistic as lost_statistic
from .calibration_file import read_calibration as read_calibration
from .calibration_file import statistic_key as statistic_key
from .calibration_file import write_calibration as write_calibration
from .data import load_texts as load_texts
from .data import share as share
from .data import token_batches as token_batches
from .hearing import deaf as deaf
from .input_sums import Merged as Merged
from .keeping import CalibrationKeeper as CalibrationKeeper
from .keeping import SquareSums as SquareSums
from .kv_cache import calibrate_kv_cache as calibrate_kv_cache
from .kv_cache import run_rest as run_rest
from .kv_cache import watch as watch
from .learned_scales import ScaleLearner as ScaleLearner
from .observe import unquantized as unquantized
from .passes import MomentPass as MomentPass
from .passes import moment_passes as moment_passes
from .search import follow_weights as follow_weights
from .second_moments import MomentSource as MomentSource
from .second_moments import round_weights as round_weights
from .training import Drift as Drift
from .training import Ranges as Ranges
from .training import RunningInputs as RunningInputs
from .training import largest_drift as largest_drift
from .training import merge_live as merge_live
from .training import ranges_of as ranges_of
from .training import set_ranges as set_ranges
from .training import update_inputs as update_inputs

__all__ = [
    "AMAX",
    "MOMENT",
    "PEAKS",
    "SQUARES",
    "CalibrationFile",
    "CalibrationKeeper",
    "CalibrationReport",
    "ColdExperts",
    "Drift",
    "InputRules",
    "Late",
    "Merged",
    "MomentPass",
    "MomentSource",
    "Ranges",
    "RunningInputs",
    "ScaleLearner",
    "SquareSums",
    "cache_key",
    "calibrate",
    "calibrate_kv_cache",
    "calibrate_weights",
    "deaf",
    "follow_weights",
    "largest_drift",
    "load_inputs",
    "load_texts",
    "loaded_amaxes",
    "lost_statistic",
    "merge_cache",
    "merge_live",
    "moment_passes",
    "ranges_of",
    "read_calibration",
    "refresh_weights",
    "round_weights",
    "run_rest",
    "set_ranges",
    "share",
    "statistic_key",
    "token_batches",
    "unquantized",
    "update_inputs",
    "watch",
    "write_calibration",
]
