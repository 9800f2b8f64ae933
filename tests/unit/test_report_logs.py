"""``--log-to``: event files by their bytes, MLflow by what it is called with."""

import importlib.machinery
import struct
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_quant.errors import QuantError
from megatron_quant.report import Facts, check_tracker, log_facts, tracker_of
from megatron_quant.report.events import crc32c, record
from megatron_quant.report.figures import metrics, params, series
from tests.unit import report_world as world


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message of protocol buffers: number, and a number or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        size = {0: 0, 1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = varint() if size is None else size
        data, at = message[at : at + length], at + length
        yield (
            key >> 3,
            {1: lambda d: struct.unpack("<d", d)[0], 5: lambda d: struct.unpack("<f", d)[0]}.get(
                key & 7, bytes
            )(data),
        )


def events(content: bytes) -> Iterator[dict[int, Any]]:
    """The events of a file, after their checksums."""
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        data = content[12 : 12 + length]
        assert content[: 16 + length] == record(data)
        yield dict(fields(data))
        content = content[16 + length :]


def test_the_checksum_is_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    # the start of every file that TensorBoard itself writes
    assert record(bytes(24))[:12] == bytes.fromhex("1800000000000000a37f4b22")


def test_event_files_hold_metrics_series_and_parameters(tmp_path: Path) -> None:
    facts = world.facts()
    tracker = tracker_of(f"tensorboard:{tmp_path / 'a' / 'b'}")
    check_tracker(tracker)
    assert list(tmp_path.iterdir()) == []
    log_facts(tracker, facts)
    (file,) = (tmp_path / "a" / "b").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    first, *rest = events(file.read_bytes())
    assert first[3] == b"brain.Event:2"
    scalars: dict[str, list[tuple[int, float]]] = {}
    for event in rest:
        value = dict(fields(dict(fields(event[5]))[1]))
        if 2 in value:
            scalars.setdefault(value[1].decode(), []).append((event[2], value[2]))
        else:
            assert value[1] == b"parameters" and b"| recipe | nvfp4 |" in value[8]
    assert scalars.keys() == metrics(facts).keys() | series(facts).keys()
    assert scalars["bytes/after"] == [(0, float(facts.quantized.bytes_after))]
    name = "layers/error/mlp.experts.up_proj"
    assert dict(scalars[name]) == pytest.approx(series(facts)[name])


def test_what_is_logged() -> None:
    facts = world.facts()
    found = metrics(facts)
    assert found["experts/cold"] == 3 and found["experts/least_tokens"] == 0
    assert found["error/worst"] == max(w.error or 0 for w in facts.quantized.weights)
    assert found["seconds/load"] == 21.0 and found["fake_quant/kl"] == 0.0123
    assert params(facts)["search.candidates"] == "nvfp4, fp8, none"
    assert "layers/input_amax/self_attn.q_proj_k_proj_v_proj" in series(facts)
    evaluated = world.evaluated()
    assert metrics(evaluated)["classes/digits/kl"] == pytest.approx(0.05 / 3)
    assert len(series(evaluated)["positions/kl"]) == 32
    odd = replace(facts.quantized, seconds={"load": float("inf")})
    assert "seconds/load" not in metrics(replace(facts, quantized=odd))


class Mlflow(ModuleType):
    """MLflow's functions that are used, with its parameters; what they got is kept."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
        self.uri, self.calls, self.refused = "before", [], ""

    def MlflowClient(self, tracking_uri: str | None = None) -> None:
        if tracking_uri == "no://uri":
            raise ValueError("no such\nscheme")

    def get_tracking_uri(self) -> str:
        return self.uri

    def set_tracking_uri(self, uri: str) -> None:
        self.uri = uri

    def active_run(self) -> None:
        return None

    def start_run(self, run_name: str | None = None) -> Any:
        self.calls.append(("run", run_name, self.uri))
        return nullcontext()

    def log_params(self, params: dict[str, str]) -> None:
        self.calls.append(("params", params))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.refused:
            raise ConnectionError(self.refused)
        self.calls.append(("metrics", metrics, step))

    def log_dict(self, dictionary: dict[str, Any], artifact_file: str) -> None:
        self.calls.append(("file", artifact_file, dictionary))

    def log_text(self, text: str, artifact_file: str) -> None:
        self.calls.append(("file", artifact_file, text))


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    found = Mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", found)
    monkeypatch.delitem(sys.modules, "megatron_quant.report.mlflow_run", raising=False)
    return found


def test_mlflow_gets_parameters_metrics_and_the_page(mlflow: Mlflow) -> None:
    facts: Facts = world.facts()
    log_facts(tracker_of("mlflow:http://127.0.0.1:5000"), facts)
    run, settings, once, *steps, document, page = mlflow.calls
    assert run == ("run", "/models/Small-MoE", "http://127.0.0.1:5000")
    assert settings == ("params", params(facts)) and once == ("metrics", metrics(facts), None)
    assert [step for _, _, step in steps] == [0, 1, 2, 3]
    assert document == ("file", "report.json", facts.document())
    assert page[1] == "report.html" and page[2].startswith("<!doctype html>")
    assert mlflow.uri == "before"


def test_what_mlflow_refuses_is_one_line(mlflow: Mlflow) -> None:
    with pytest.raises(QuantError, match=r"^--log-to mlflow: no such scheme; give another URI$"):
        check_tracker(tracker_of("mlflow:no://uri"))
    mlflow.refused = "connection refused"
    with pytest.raises(QuantError, match="connection refused; the run itself is done, and so is"):
        log_facts(tracker_of("mlflow"), world.facts())


@pytest.mark.parametrize(
    ("tracker", "words"),
    [
        ("wandb", r"'wandb' names no tracker: give mlflow\[:URI\] or tensorboard\[:DIR\]"),
        ("mlflow", "--log-to mlflow needs MLflow: pip install mlflow-skinny, or leave it out"),
        (f"tensorboard:{__file__}", "is no directory; choose another"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(
    tracker: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(QuantError, match=words):
        check_tracker(tracker_of(tracker))
