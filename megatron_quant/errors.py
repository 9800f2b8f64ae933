"""Errors that a user can act on: one line that names the value and the way out."""


class QuantError(Exception):
    """Base of every error that this library raises for its user.

    The message is one line. Bugs of our own are ``AssertionError`` instead.
    """


class HostError(QuantError):
    """The machine or an installed library is not what is needed."""


class ArchitectureError(QuantError):
    """The Hugging Face config names a model that no table describes, or a variant of one."""


class LayoutError(QuantError):
    """The parallel layout does not divide the world or the model."""


class RecipeError(QuantError):
    """A quantization recipe is malformed, or a rule of it matches nothing."""


class CoverageError(QuantError):
    """A weight is claimed by no rule, or the members of a fused group by different ones."""


class FormatError(QuantError):
    """A tensor cannot be stored in the chosen number format."""


class CalibrationError(QuantError):
    """A statistic is missing or not finite."""


class CheckpointError(QuantError):
    """A checkpoint that was given as input cannot be used."""


class ExportError(QuantError):
    """The output cannot be written."""


class VerifyError(QuantError):
    """A written checkpoint is not what its own config says."""


class RankError(QuantError):
    """Another rank failed or is gone, or the ranks of a run were not started alike."""


class LostRankError(RankError):
    """Other ranks do not answer: one was killed, perhaps. What was written may be continued."""
