"""Training and testing with a Trainer, with one-line errors."""

from __future__ import annotations

import logging
import shlex
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import GPUTooOldForTriton, TritonMissing
from torch.distributed import DistError

from ldm.callbacks.signals import TrainingStopped
from ldm.config.load import needs_trust
from ldm.host_memory import keep_freed_memory
from ldm.training.compatibility import check_compatibility
from ldm.training.run import Run
from ldm.training.strategies import HostStateStrategy
from ldm.util import UserError

log = logging.getLogger(__name__)

# Messages of the plain RuntimeErrors that gloo raises after another process has ended.
_PEER_ENDED = ("Connection closed by peer", "Connection reset by peer")


def fit(trainer: Trainer, model: LightningModule, data: LightningDataModule, config: DictConfig, run: Run) -> None:
    """Train, from `run.resume` if there is one.

    Raises:
        SystemExit: a signal stopped the training, after its state was saved. The code is 0 for Ctrl-C, 143 for SIGTERM.
        UserError: Lightning or the optimizer refuses the combination of arguments, or the device has too little memory.
    """
    check_compatibility(model, trainer)
    use_tensor_cores(trainer.strategy.root_device)
    if trainer.strategy.root_device.type == "cpu" or isinstance(trainer.strategy, HostStateStrategy):
        keep_freed_memory()
    log.info("Run folder: %s", run.folder)
    try:
        with _one_line_errors(run.folder):
            try:
                trainer.fit(model, data, ckpt_path=run.resume, weights_only=True)
            except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
                if isinstance(error, UserError) or not _restores(error):
                    raise
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                advice = "the file may be damaged; resume another checkpoint"
                raise UserError(f"{run.resume}: its state cannot be restored ({reason}); {advice}") from error
    except (UserError, SystemExit):
        if trainer.is_global_zero and not run.configs.is_dir():  # its first step makes this folder
            shutil.rmtree(run.folder, ignore_errors=True)  # the run has not begun
        raise
    except TrainingStopped as stop:
        trust = " --trust-config" if needs_trust(config) else ""
        log.info(
            "Training %s; continue with: python main.py --resume %s -t%s", stop, shlex.quote(str(run.folder)), trust
        )
        raise SystemExit(0 if stop.signum == signal.SIGINT else 128 + stop.signum) from None


def use_tensor_cores(device: torch.device) -> None:
    """Allow TF32 in float32 matrix products on a CUDA `device`, as torch's default does for convolutions.

    They take several times as long otherwise. NVIDIA_TF32_OVERRIDE=0 in the environment turns TF32 off for both.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def test(trainer: Trainer, model: LightningModule, data: LightningDataModule, config: DictConfig) -> None:
    """Evaluate the test set with the present weights of `model`, if the data have one and the model has a test step."""
    if not is_overridden("test_step", model, LightningModule):
        log.info("No test: %s has no test step", type(model).__name__)
    elif not any((config.data.get("params") or {}).get(key) for key in ("test", "test_urls")):
        log.info("No test: the config has no test set")
    else:
        with _one_line_errors(Path(trainer.default_root_dir)):
            trainer.test(model, datamodule=data, verbose=trainer.is_global_zero)


def _restores(error: BaseException) -> bool:
    """Return True if `error` was raised while Lightning restored the state of a checkpoint."""
    if "loaded state dict" in str(error):
        return False  # another optimizer; `_one_line_errors` has a message for it
    frames = traceback.extract_tb(error.__traceback__)
    return any("checkpoint_connector" in frame.filename and frame.name.startswith("restore") for frame in frames)


@contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    """Turn errors that users can correct into `UserError`s; an error without a file name gets the name `folder`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise UserError(
            f"{folder}: cannot be read or written ({error.strerror or error}); mend this, or give another --logdir"
        ) from error
    except MisconfigurationException as error:
        raise UserError(f"lightning: {' '.join(str(error).split())}") from error
    except ValueError as error:
        if "val_check_interval" in str(error) and not isinstance(error, UserError):
            raise UserError(
                f"lightning.trainer.val_check_interval: longer than an epoch ({' '.join(str(error).split())}); "
                "give fewer batches, or add --check_val_every_n_epoch None to count them across epochs"
            ) from error
        if "loaded state dict" not in str(error):
            raise
        raise UserError(f"the optimizer state of the checkpoint does not fit this config ({error})") from error
    except torch.OutOfMemoryError as error:
        first = str(error).split(". ")[0]
        raise UserError(f"{first}; lower data.params.batch_size and raise --accumulate_grad_batches") from error
    except (BackendCompilerFailed, TritonMissing, GPUTooOldForTriton) as error:
        reason = str(getattr(error, "inner_exception", error)).partition("\n")[0]
        raise UserError(
            f"torch.compile failed ({reason}). It needs a C++ compiler, and Triton on a GPU; install them, or set "
            "model.params.unet_config.params.compile_mode=null (low-bit optimizers need them on a GPU in any case)"
        ) from error
    except RuntimeError as error:
        if str(error).startswith("Early stopping conditioned on metric"):
            raise UserError(f"lightning.callbacks: EarlyStopping: {' '.join(str(error).split())}") from error
        if not isinstance(error, DistError) and not any(text in str(error) for text in _PEER_ENDED):
            raise
        reason = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
        raise UserError(
            f"another process of the training has ended or cannot be reached ({reason}); "
            "resume the last checkpoint with --resume"
        ) from error
