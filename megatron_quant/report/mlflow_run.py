"""MLflow: the facts of a run as one of its runs. The only file that imports it."""

from contextlib import nullcontext

import mlflow

from megatron_quant.report.facts import Facts
from megatron_quant.report.figures import metrics, params, series
from megatron_quant.report.page import page_of

_LONGEST = 500  # characters of a parameter that every tracking server takes


def check_uri(uri: str) -> None:
    """Raise MLflow's own error for a URI that it does not take. No server is asked."""
    mlflow.MlflowClient(tracking_uri=uri or None)


def log_run(uri: str, facts: Facts) -> None:
    """Log the facts into the active run, or into a new one.

    uri: of the tracking server or folder; empty for MLflow's own setting.
    """
    before = mlflow.get_tracking_uri()
    if uri:
        mlflow.set_tracking_uri(uri)
    try:
        run = nullcontext() if mlflow.active_run() else mlflow.start_run(run_name=facts.model)
        with run:
            mlflow.log_params({k: v[:_LONGEST] for k, v in params(facts).items()})
            mlflow.log_metrics(metrics(facts))
            for step, values in _by_step(facts).items():
                mlflow.log_metrics(values, step=step)
            mlflow.log_dict(facts.document(), "report.json")
            mlflow.log_text(page_of(facts), "report.html")
    finally:
        if uri:
            mlflow.set_tracking_uri(before)


def _by_step(facts: Facts) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for name, steps in series(facts).items():
        for step, value in steps.items():
            found.setdefault(step, {})[name] = value
    return dict(sorted(found.items()))
