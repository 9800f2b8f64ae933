from .places import Candidates as Candidates
from .places import live_places as live_places
from .scores import LiveScorer as LiveScorer
from .training import activations_alone as activations_alone

__all__ = [
    "Candidates",
    "LiveScorer",
    "activations_alone",
    "live_places",
]
