from . import store as store
from .folder import Content as Content
from .folder import check_free as check_free
from .folder import check_own as check_own
from .folder import read_written as read_written
from .folder import remove_own as remove_own
from .folder import write_folder as write_folder
from .place import TRACKER as TRACKER
from .place import is_checkpoint as is_checkpoint
from .place import latest as latest
from .plain import PlainWeights as PlainWeights
from .plain import open_plain as open_plain
from .restored import open_saved as open_saved
from .restored import read_saved as read_saved
from .restored import restore as restore
from .run_config import model_of_run as model_of_run
from .saved import HF_FILES as HF_FILES
from .saved import Saved as Saved
from .saved import describe_run as describe_run
from .state import before_save as before_save
from .state import describe_model as describe_model
from .store import OPTIMIZER as OPTIMIZER
from .store import RESHARDABLE as RESHARDABLE
from .store import Chunks as Chunks
from .store import check_keys as check_keys
from .store import read_tensors as read_tensors
from .store import shapes_of as shapes_of
from .store import sharded_state as sharded_state
from .stored import CHILD as CHILD
from .stored import is_quantized as is_quantized
from .stored import open_stored as open_stored
from .torch_dist import TorchDist as TorchDist
from .torch_dist import open_torch_dist as open_torch_dist

__all__ = [
    "CHILD",
    "HF_FILES",
    "OPTIMIZER",
    "RESHARDABLE",
    "TRACKER",
    "Chunks",
    "Content",
    "PlainWeights",
    "Saved",
    "TorchDist",
    "before_save",
    "check_free",
    "check_keys",
    "check_own",
    "describe_model",
    "describe_run",
    "is_checkpoint",
    "is_quantized",
    "latest",
    "model_of_run",
    "open_plain",
    "open_saved",
    "open_stored",
    "open_torch_dist",
    "read_saved",
    "read_tensors",
    "read_written",
    "remove_own",
    "restore",
    "shapes_of",
    "sharded_state",
    "store",
    "write_folder",
]
