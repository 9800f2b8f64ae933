from .checkpoint import Report as Report
from .checkpoint import verify as verify

__all__ = ["Report", "verify"]
