"""Train a latent diffusion model or an autoencoder from YAML configs: `python main.py --help`."""

from __future__ import annotations

import importlib
import pdb
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ldm.cli.run import run
from ldm.training.arguments import parse_arguments

# Classes that YAML files name as `main.X`. They are imported on use, so that `--help` does not import torch.
_EXPORTS = {
    "DataModuleFromConfig": "ldm.data.config_module",
    "WebDataNpyModuleFromConfig": "ldm.data.datamodule",
    "SetupCallback": "ldm.callbacks.setup",
    "ImageLogger": "ldm.callbacks.image_logger",
    "CUDACallback": "ldm.callbacks.device",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Parse, merge, read, build, fit and test."""
    arguments = parse_arguments(sys.argv[1:])

    from ldm.callbacks.signals import SignalRequests
    from ldm.config.load import build_data
    from ldm.planning.warning import begin_forecast, warn_if_too_large
    from ldm.reporting.report_file import report_at_end
    from ldm.training.callbacks import build_callbacks
    from ldm.training.fit import fit, test
    from ldm.training.loggers import build_loggers
    from ldm.training.resume import build_from, read_training_checkpoint, seed_run
    from ldm.training.run import hold_run, plan_run
    from ldm.training.trainer import build_trainer, merge_config, set_learning_rate

    plan = plan_run(arguments)
    with hold_run(plan), SignalRequests() as requests, report_at_end(plan), _debugger_on_error(arguments.debug):
        config = merge_config(arguments, plan)
        forecast = begin_forecast(config) if arguments.train else None  # in parallel with reading weights and data
        checkpoint = read_training_checkpoint(plan.resume)
        seed = seed_run(arguments.seed, checkpoint)
        data = build_data(config)
        model = build_from(config, checkpoint)
        callbacks = build_callbacks(config, plan, requests, seed)
        loggers = build_loggers(config, plan, arguments.project)
        trainer = build_trainer(config, model, data, callbacks, loggers, plan, checkpoint)
        del checkpoint  # the trainer holds it until it is restored
        if arguments.train:
            set_learning_rate(model, config, trainer)
            warn_if_too_large(config, trainer.strategy, forecast, plan.events)
            fit(trainer, model, data, config, plan)
        if not arguments.no_test:
            test(trainer, model, data, config)


@contextmanager
def _debugger_on_error(debug: bool) -> Iterator[None]:
    """Open the debugger at the place of an error, if `debug`."""
    try:
        yield
    except Exception:
        if debug:
            traceback.print_exc()
            pdb.post_mortem()
        raise


if __name__ == "__main__":
    run(main)
