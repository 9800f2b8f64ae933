from .conversion import ExportOptions as ExportOptions
from .conversion import reexport as reexport
from .file_to_file import Streamed as Streamed
from .file_to_file import plan_stream as plan_stream
from .file_to_file import stream as stream
from .job import Job as Job
from .job import prepare_job as prepare_job
from .megatron import Outcome as Outcome
from .megatron import quantize as quantize
from .options import DTYPES as DTYPES
from .options import QuantizeOptions as QuantizeOptions
from .options import chosen_recipe as chosen_recipe
from .options import dtype_of as dtype_of

__all__ = [
    "DTYPES",
    "ExportOptions",
    "Job",
    "Outcome",
    "QuantizeOptions",
    "Streamed",
    "chosen_recipe",
    "dtype_of",
    "plan_stream",
    "prepare_job",
    "quantize",
    "reexport",
    "stream",
]
