from .checkpoints import convert as convert
from .checkpoints import evaluate as evaluate
from .checkpoints import plan as plan
from .checkpoints import plan_search as plan_search
from .checkpoints import quantize_checkpoint as quantize_checkpoint
from .checkpoints import stream as stream
from .checkpoints import verify as verify
from .conversion import Rewritten as Rewritten
from .family_sensitivity import sensitivity as sensitivity
from .file_to_file import Streamed as Streamed
from .finding import find_recipe as find_recipe
from .finding import search_again as search_again
from .found import Found as Found
from .job import Job as Job
from .known import Choices as Choices
from .known import choices as choices
from .live import Exported as Exported
from .live import export as export
from .live import export_tensors as export_tensors
from .live import quantize as quantize
from .live import restore as restore
from .live import save as save
from .megatron import Outcome as Outcome
from .search_dry_run import PlannedSearch as PlannedSearch
from .sensitivity_rows import Sensitivity as Sensitivity
from .settings import AutoQuantize as AutoQuantize
from .settings import Calibration as Calibration
from .settings import Parallel as Parallel
from .settings import Serve as Serve
from .settings import Write as Write

__all__ = [
    "AutoQuantize",
    "Calibration",
    "Choices",
    "Exported",
    "Found",
    "Job",
    "Outcome",
    "Parallel",
    "PlannedSearch",
    "Rewritten",
    "Sensitivity",
    "Serve",
    "Streamed",
    "Write",
    "choices",
    "convert",
    "evaluate",
    "export",
    "export_tensors",
    "find_recipe",
    "plan",
    "plan_search",
    "quantize",
    "quantize_checkpoint",
    "restore",
    "save",
    "search_again",
    "sensitivity",
    "stream",
    "verify",
]
