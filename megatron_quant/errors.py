"""Errors that a user can act on: one line that names the value and the way out."""


class QuantError(Exception):
    """Base of every error that this library raises for its user.

    The message is one line. Bugs of our own are ``AssertionError`` instead.
    """


class HostError(QuantError):
    """The machine or an installed library does not do."""


class ArchitectureError(QuantError):
    """No table describes the model, or the variant of it, that the Hugging Face config names."""


class LayoutError(QuantError):
    """The parallel layout does not divide the world or the model."""


class RecipeError(QuantError):
    """A quantization recipe is malformed, or a rule of it matches nothing."""


class CoverageError(QuantError):
    """No rule claims a weight, or different rules claim members of a fused group."""


class FormatError(QuantError):
    """A tensor cannot be stored in the chosen number format."""


class CalibrationError(QuantError):
    """A statistic is missing or not finite."""


class CheckpointError(QuantError):
    """An input checkpoint cannot be used."""


class ExportError(QuantError):
    """The output cannot be written."""


class VerifyError(QuantError):
    """A written checkpoint does not match its own config."""


class RankError(QuantError):
    """Another rank failed or is gone, or the ranks of a run were not started alike."""


class LostRankError(RankError):
    """Other ranks do not answer; one may have been killed. What was written may be continued."""
