"""The page in a browser, and trackers of experiments themselves: make test-report.

Each is skipped where it is not at hand, but under make test-report, which says that all are.
"""

import os
import shutil

REQUIRED = bool(os.environ.get("MEGATRON_QUANT_REPORT_TESTS"))
CHROMIUM = os.environ.get("MEGATRON_QUANT_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), ""
)
TRACKERS = os.environ.get("MEGATRON_QUANT_TRACKERS_PYTHON", "")
