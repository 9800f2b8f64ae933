from .checkpoints import convert as convert
from .checkpoints import evaluate as evaluate
from .checkpoints import plan as plan
from .checkpoints import quantize_checkpoint as quantize_checkpoint
from .checkpoints import stream as stream
from .checkpoints import verify as verify
from .conversion import ExportOptions as ExportOptions
from .conversion import reexport as reexport
from .file_to_file import Streamed as Streamed
from .file_to_file import plan_stream as plan_stream
from .file_to_file import stream_files as stream_files
from .job import Job as Job
from .job import planned as planned
from .live import export as export
from .live import export_tensors as export_tensors
from .live import quantize as quantize
from .live import restore as restore
from .live import save as save
from .megatron import Outcome as Outcome
from .megatron import quantize_run as quantize_run
from .options import DTYPES as DTYPES
from .options import QuantizeOptions as QuantizeOptions
from .options import check_plannable as check_plannable
from .options import chosen_recipe as chosen_recipe
from .options import dtype_of as dtype_of
from .settings import Calibration as Calibration
from .settings import Parallel as Parallel
from .settings import Serve as Serve
from .settings import Write as Write
from .settings import from_flags as from_flags

__all__ = [
    "DTYPES",
    "Calibration",
    "ExportOptions",
    "Job",
    "Outcome",
    "Parallel",
    "QuantizeOptions",
    "Serve",
    "Streamed",
    "Write",
    "check_plannable",
    "chosen_recipe",
    "convert",
    "dtype_of",
    "evaluate",
    "export",
    "export_tensors",
    "from_flags",
    "plan",
    "plan_stream",
    "planned",
    "quantize",
    "quantize_checkpoint",
    "quantize_run",
    "reexport",
    "restore",
    "save",
    "stream",
    "stream_files",
    "verify",
]
