"""Load calibration texts from a dataset of the Hugging Face hub, by the package ``datasets``."""

from itertools import islice

import datasets

from megatron_quant.calib.records import MAX_ROWS, Document, of_rows
from megatron_quant.errors import CalibrationError


def load_hub_texts(spec: str) -> list[Document]:
    """Load ``text``, or chats, of the first rows of a data set's ``train`` split.

    Args:
        spec: ``id`` or ``id:configuration``.

    Raises:
        CalibrationError: Where the hub does not give the data set, or it has neither.
    """
    name, _, configuration = spec.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        records = list(islice(rows, MAX_ROWS))
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise CalibrationError(f"cannot read dataset {spec!r} from the hub: {reason}") from None
    return list(of_rows(records, f"dataset {spec!r}"))
