"""TensorBoard and MLflow themselves read what was logged."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_quant.report.figures import metrics, params, series
from tests.report import REQUIRED, TRACKERS
from tests.unit import report_world as world

pytestmark = pytest.mark.skipif(not (TRACKERS or REQUIRED), reason="run make test-report")
ROOT = Path(__file__).parents[2]


def test_trackers_read_what_was_logged(tmp_path: Path) -> None:
    done = subprocess.run(
        [TRACKERS, "-m", "tests.report.log_and_read", tmp_path / "tb", f"file://{tmp_path}/ml"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_ALLOW_FILE_STORE": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tensorboard, mlflow = json.loads(done.stdout.splitlines()[-1])
    facts = world.facts()
    meant = {name: {0: value} for name, value in metrics(facts).items()} | series(facts)
    assert tensorboard["scalars"].keys() == mlflow["metrics"].keys() == meant.keys()
    for name, points in meant.items():
        assert {int(step): value for step, value in mlflow["metrics"][name]} == points, name
        read = {int(step): value for step, value in tensorboard["scalars"][name]}
        assert read == pytest.approx(points, rel=1e-6), name  # fp32
    assert mlflow["params"] == params(facts)
    assert (mlflow["files"], mlflow["status"]) == (["report.html", "report.json"], "FINISHED")
    assert "| recipe | nvfp4 |" in tensorboard["text"]
