from .ckpt.plan import ExportPlan as ExportPlan
from .ckpt.plan import StoredTensor as StoredTensor
from .ckpt.verify import Report as Report
from .cpu import use_cpu as use_cpu
from .dist import Groups as Groups
from .errors import QuantError as QuantError
from .mcore.live import Quantized as Quantized
from .mcore.live import quantized as quantized
from .mcore.live import update as update
from .recipes import Recipe as Recipe
from .recipes import load_recipe as load_recipe
from .runs import AutoQuantize as AutoQuantize
from .runs import Calibration as Calibration
from .runs import Choices as Choices
from .runs import Exported as Exported
from .runs import Found as Found
from .runs import Job as Job
from .runs import Outcome as Outcome
from .runs import Parallel as Parallel
from .runs import PlannedSearch as PlannedSearch
from .runs import Rewritten as Rewritten
from .runs import Sensitivity as Sensitivity
from .runs import Serve as Serve
from .runs import Streamed as Streamed
from .runs import Write as Write
from .runs import choices as choices
from .runs import convert as convert
from .runs import evaluate as evaluate
from .runs import export as export
from .runs import export_tensors as export_tensors
from .runs import find_recipe as find_recipe
from .runs import plan as plan
from .runs import plan_search as plan_search
from .runs import quantize as quantize
from .runs import quantize_checkpoint as quantize_checkpoint
from .runs import restore as restore
from .runs import save as save
from .runs import search_again as search_again
from .runs import sensitivity as sensitivity
from .runs import stream as stream
from .runs import verify as verify

__version__: str
__all__ = [
    "AutoQuantize",
    "Calibration",
    "Choices",
    "ExportPlan",
    "Exported",
    "Found",
    "Groups",
    "Job",
    "Outcome",
    "Parallel",
    "PlannedSearch",
    "QuantError",
    "Quantized",
    "Recipe",
    "Report",
    "Rewritten",
    "Sensitivity",
    "Serve",
    "StoredTensor",
    "Streamed",
    "Write",
    "choices",
    "convert",
    "evaluate",
    "export",
    "export_tensors",
    "find_recipe",
    "load_recipe",
    "plan",
    "plan_search",
    "quantize",
    "quantize_checkpoint",
    "quantized",
    "restore",
    "save",
    "search_again",
    "sensitivity",
    "stream",
    "update",
    "use_cpu",
    "verify",
]
