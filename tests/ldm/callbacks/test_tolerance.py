"""Tests of logs and images on a full disk: one warning, and one message when they can be written again."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from ldm.callbacks.tolerance import Tolerance, tolerant
from ldm.util import UserError

FULL = OSError(28, "No space left on device")


def test_tolerance_logs_each_change_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tolerance = Tolerance("Images")
    for fails in (True, True, False, False, True):
        with tolerance():
            if fails:
                raise FULL
    said = [message.strip() for message in caplog.messages]
    lost = "Images cannot be written ([Errno 28] No space left on device); training continues without it"
    assert said == [lost, "Images can be written again", lost]


@pytest.mark.parametrize(("error", "reason"), [(OSError("\n b\nc"), "b"), (OSError(" "), "OSError")])
def test_tolerance_names_a_reason(caplog: pytest.LogCaptureFixture, error: OSError, reason: str) -> None:
    with Tolerance("Images")():
        raise error
    assert f"Images cannot be written ({reason});" in caplog.text


def test_tolerance_passes_user_errors_on() -> None:
    with pytest.raises(UserError), Tolerance("Images")():
        raise UserError("ours")


def test_tolerant_csv_writes_each_line_once(tmp_path: Path, monkeypatch, caplog) -> None:
    logger = tolerant(CSVLogger(str(tmp_path), name="csv"))
    write = csv.DictWriter.writerows

    def half(self, rows) -> None:
        write(self, rows)
        raise FULL

    for step in range(6):
        with monkeypatch.context() as patch:
            if step in (2, 3):  # with a column more: then the file is written anew
                patch.setattr("csv.DictWriter.writerows", half)
            logger.log_metrics({"loss": step} | ({"eval": 1} if step == 3 else {}), step)
            logger.save()
    (path,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [int(row["step"]) for row in rows] == list(range(6)) and rows[3]["eval"] == "1"
    assert len([message for message in caplog.messages if "cannot be written" in message]) == 1


def test_tolerant_tensorboard_writes_after_its_thread_has_died(tmp_path: Path, monkeypatch, caplog) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: object) -> None:
        raise FULL

    monkeypatch.setattr("threading.excepthook", lambda _: None)
    now = 0.0
    monkeypatch.setattr("ldm.callbacks.tolerance.time.monotonic", lambda: now)
    logger = tolerant(TensorBoardLogger(str(tmp_path), name="tensorboard", version=""))
    logger.log_metrics({"loss": 0.0}, 0)
    logger.save()
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", full)
        for step in range(1, 30):
            logger.log_metrics({"loss": 0.0}, step)
            logger.save()
    now = 100.0
    logger.log_metrics({"loss": 0.0}, 30)
    logger.save()
    logger.finalize("success")
    assert len([message for message in caplog.messages if "cannot be written" in message]) == 1
    assert b"loss" in max(tmp_path.rglob("events*"), key=lambda path: path.name).read_bytes()
