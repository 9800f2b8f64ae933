from .checkpoint import Report as Report
from .checkpoint import Share as Share
from .checkpoint import joined as joined
from .checkpoint import verify as verify
from .checkpoint import verify_share as verify_share

__all__ = ["Report", "Share", "joined", "verify", "verify_share"]
