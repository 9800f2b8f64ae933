from .algorithm import GptqSettings as GptqSettings
from .algorithm import Piece as Piece
from .algorithm import default_damp as default_damp
from .algorithm import factored as factored
from .algorithm import gptq as gptq
from .algorithm import gptq_pieces as gptq_pieces
from .feedback import Feedback as Feedback
from .learned import scale_gradient as scale_gradient
from .served import Correction as Correction
from .served import correction as correction
from .served import serve_ as serve_
from .weights import importance as importance

__all__ = [
    "Correction",
    "Feedback",
    "GptqSettings",
    "Piece",
    "correction",
    "default_damp",
    "factored",
    "gptq",
    "gptq_pieces",
    "importance",
    "scale_gradient",
    "serve_",
]
