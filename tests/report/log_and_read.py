"""Log facts to both trackers and print, as JSON, what they read: in an environment that has them.

It imports no torch: the environment has none.
"""

import json
import sys
from typing import Any

from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_quant.report import Facts, check_tracker, log_facts, tracker_of
from tests.unit import report_world as world


def logged(tracker: str, facts: Facts) -> None:
    """Do what a run with ``--log-to`` does."""
    found = tracker_of(tracker)
    check_tracker(found)
    log_facts(found, facts)


def tensorboard(folder: str, facts: Facts) -> dict[str, Any]:
    """Return what TensorBoard reads."""
    logged(f"tensorboard:{folder}", facts)
    read = EventAccumulator(folder)
    read.Reload()
    tags = read.Tags()
    (text,) = (read.Tensors(tag)[0].tensor_proto.string_val[0] for tag in tags["tensors"])
    scalars = {t: [(e.step, e.value) for e in read.Scalars(t)] for t in tags["scalars"]}
    return {"scalars": scalars, "text": text.decode()}


def mlflow(uri: str, facts: Facts) -> dict[str, Any]:
    """Return what MLflow reads."""
    logged(f"mlflow:{uri}", facts)
    client = MlflowClient(uri)
    (run,) = client.search_runs(["0"])
    history = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    files = sorted(f.path for f in client.list_artifacts(run.info.run_id))
    return {
        "metrics": history,
        "params": run.data.params,
        "files": files,
        "status": run.info.status,
    }


if __name__ == "__main__":
    of_tensorboard = tensorboard(sys.argv[1], world.facts())
    print(json.dumps([of_tensorboard, mlflow(sys.argv[2], world.facts())]))
