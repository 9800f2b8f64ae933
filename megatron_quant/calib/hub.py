"""Calibration texts from a dataset of the Hugging Face hub, through the package ``datasets``."""

from itertools import islice

import datasets

from megatron_quant.errors import CalibrationError

_MAX_ROWS = 4096  # streamed: enough for calibration, little of a large data set


def load_hub_texts(spec: str) -> list[str]:
    """The first rows' ``text`` of the ``train`` split of ``id`` or ``id:configuration``.

    Raises CalibrationError where the hub does not give the data set or it has no ``text``.
    """
    name, _, configuration = spec.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        records = list(islice(rows, _MAX_ROWS))
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise CalibrationError(f"cannot read dataset {spec!r} from the hub: {reason}") from None
    for record in records[:1]:
        if not isinstance(record.get("text"), str):
            raise CalibrationError(
                f"dataset {spec!r} has no column 'text', only {', '.join(record)}; save the texts "
                "to a .jsonl with 'text' and give that"
            )
    return [record["text"] for record in records]
