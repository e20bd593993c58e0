"""Writing of a report: by a tool, and at the end of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.callbacks.signals import TrainingStopped
from ldm.distributed.ranks import is_first_process
from ldm.events import END, FAULT, STOP
from ldm.host_memory import available_memory
from ldm.reporting import SAMPLES
from ldm.reporting.run_folder import RunRecord, read_run
from ldm.reporting.settings import merged_config, params_of
from ldm.reporting.training_sets import NO_SAMPLES, SampleLimits, load_first_stage, read_contents
from ldm.training.run import Run
from ldm.util import UserError

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

REPORT = "report.html"  # in the run folder
_IMAGE_BUDGET = 5 << 20  # bytes of logged images in a page
_SECONDS_AT_END = 20.0  # in which the report at the end of a run decodes samples


def report_path(folders: Sequence[Path]) -> Path:
    """Return the default path of a report about the runs in `folders`."""
    return folders[0] / REPORT if len(folders) == 1 else folders[0].parent / "comparison.html"


def write_report(folders: Sequence[Path], out: Path, limits: SampleLimits = NO_SAMPLES) -> None:
    """Write a report about the runs in `folders` to `out`, with samples of each training set within `limits`.

    Raises:
        UserError: a folder is missing, or not of a run.
    """
    from ldm.reporting.page import write_page  # imports matplotlib, for which the start of a run need not wait

    runs = [read_run(folder, _IMAGE_BUDGET // len(folders)) for folder in folders]
    for run in runs:
        _add_contents(run, limits)
    write_page(runs, out)


def _add_contents(run: RunRecord, limits: SampleLimits) -> None:
    """Add the samples of the training set to `run`, if the set and the autoencoder can be read."""
    urls = params_of(run.settings.config, "data").get("training_urls")
    if not limits.count or not any(part.name == "training" and part.size for part in run.sets):
        return
    first_stage: nn.Module | None = None
    try:
        first_stage = load_first_stage(run.last, run.configs) if run.last.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        run.problems.append(f"the autoencoder cannot be read: {_first_line(error)}")
    try:
        read_contents(run.contents, urls, first_stage, limits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        run.problems.append(f"data.params.training_urls: no samples are shown ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


@contextmanager
def report_at_end(run: Run) -> Iterator[None]:
    """Record the warnings and the end of the block, and then write the report of `run`.

    No report is written with `lightning.report=false`, or after a signal to quit at once. An error in the report gives
    a warning.
    """
    if not is_first_process():
        yield
        return
    is_quitting = False
    with run.events.collecting_warnings():
        try:
            yield
            run.events.add(END)
        except SystemExit as stop:
            is_quitting = not isinstance(stop.__context__, TrainingStopped)
            run.events.add(STOP, text=f"exit code {stop.code}" if is_quitting else str(stop.__context__))
            raise
        except BaseException as error:
            run.events.add(FAULT, text=f"{'' if isinstance(error, UserError) else type(error).__name__ + ': '}{error}")
            raise
        finally:
            if not is_quitting and run.configs.is_dir():
                _write_tolerantly(run)


def _write_tolerantly(run: Run) -> None:
    try:
        section = merged_config(run.saved_configs, []).get("lightning", {})
        if section.get("report") is not False:
            limits = SampleLimits(SAMPLES, _SECONDS_AT_END, available_memory() or math.inf)
            write_report([run.folder], run.folder / REPORT, limits)
            log.info("Report: %s", run.folder / REPORT)
    except Exception as error:  # a report that fails must not change how the run ends
        log.warning("\nNo report: %s", _first_line(error))
