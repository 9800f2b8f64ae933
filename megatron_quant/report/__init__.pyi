from .facts import Evaluation as Evaluation
from .facts import Facts as Facts
from .facts import Part as Part
from .facts import Quality as Quality
from .facts import Quantized as Quantized
from .facts import Rule as Rule
from .facts import Search as Search
from .facts import Weight as Weight
from .facts import search_of as search_of
from .facts import sensitivity_of as sensitivity_of
from .page import page_of as page_of
from .trackers import check_tracker as check_tracker
from .trackers import log_facts as log_facts
from .trackers import tracker_of as tracker_of
from .write import check_report_files as check_report_files
from .write import report_files as report_files
from .write import write_report_files as write_report_files

__all__ = [
    "Evaluation",
    "Facts",
    "Part",
    "Quality",
    "Quantized",
    "Rule",
    "Search",
    "Weight",
    "check_report_files",
    "check_tracker",
    "log_facts",
    "page_of",
    "report_files",
    "search_of",
    "sensitivity_of",
    "tracker_of",
    "write_report_files",
]
