"""Seeded losses of a fixed set of runs of the demo's model, with all digits, to compare before and after a refactor.

    python benchmarks/seeded_losses.py --folder seeded > before.txt

Each line gives a run, an optimizer step, a batch of the epoch, and the training loss in hexadecimal. The last line of a
run is the SHA-256 of the weights in its `last.ckpt`. The numbers depend on the processor and on torch, so compare
outputs from the same machine only.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.child_runs import read_losses, start  # noqa: E402
from ldm.cli.run import call, run  # noqa: E402
from ldm.util import UserError  # noqa: E402

logger = logging.getLogger(__name__)

RELEASE = ROOT / "data/base/emoji.safetensors"
SHORT = "-t --no-test --max_steps 6 data.params.batch_size=4 lightning.callbacks.image_logger.params.disabled=true"
PRIOR = "data.params.prior_urls={}/prior/animals-000000.tar"
# A run is one or several starts of main.py, each given by its words. Each start resumes the one before it. `{}` is the
# folder.
RUNS = {
    "plain": ["--base demo_tiny.yaml model.params.use_ema=false"],
    "ema": ["--base demo_tiny.yaml"],
    "accumulate": ["--base demo_tiny.yaml --accumulate_grad_batches 2"],
    "lean": ["--base demo_tiny.yaml lean.yaml"],
    "minimal": ["--base demo_tiny.yaml minimal.yaml"],
    "prior": ["--base demo_tiny.yaml prior_images.yaml " + PRIOR],
    "resumed": ["--base demo_tiny.yaml --max_steps 3", "--max_steps 6"],
}


def prepare(folder: Path) -> None:
    """Encode the cats, sample a prior, and put the release into a training checkpoint."""
    release = ("--ckpt", RELEASE, "--config", "demo_tiny_release.yaml")
    call("tools/preencode.py", *release, "--images", "data/cats", "--size", 64, "--out", folder / "cats/%06d.tar")
    sampling = ("--prompt", "panda", "wolf", "--n", 4, "--steps", 4, "--sampler", "dpm_solver")
    call("tools/make_prior.py", *release, *sampling, "--out", folder / "prior/animals-%06d.tar")
    hack = ("--release", RELEASE, "--base", "demo_tiny.yaml", "--out", folder / "start.ckpt")
    call("tools/hack_weights.py", *hack)


def losses_of(name: str, starts: list[str], folder: Path) -> list[str]:
    """Return the lines of the run `name`, made of one or several `starts`.

    Raises:
        UserError: a start failed.
    """
    losses, output, logs = folder / f"{name}.losses", folder / f"{name}.txt", folder / f"logs-{name}"
    for number, words in enumerate(starts):
        begin = folder / "start.ckpt" if number == 0 else next(logs.iterdir())
        if number == 0:
            words = f"{words} -l {logs} data.params.training_urls={folder}/cats/000000.tar"
        line = f"--resume {begin} {SHORT} {words.format(folder)}"
        process = start(line, ROOT, output, losses)
        process.join()
        if process.exitcode:
            raise UserError(f"the run {name} ended with exit code {process.exitcode}; read {output}")
    lines = [
        f"{name} {step} {batch} {' '.join(sorted(values))}" for (step, batch), values in read_losses(losses).items()
    ]
    return [*lines, f"{name} weights {weights_digest(next(logs.iterdir()) / 'checkpoints/last.ckpt')}"]


def weights_digest(checkpoint: Path) -> str:
    """Return the SHA-256 of the names and bytes of all weights in `checkpoint`."""
    import torch

    digest = hashlib.sha256()
    for key, value in sorted(torch.load(checkpoint, weights_only=True)["state_dict"].items()):
        digest.update(key.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for all files; emptied first")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="runs to make (default: all)")
    options = parser.parse_args()
    folder = options.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepare(folder)
    for name in options.runs:
        logger.info("\n".join(losses_of(name, RUNS[name], folder)))


if __name__ == "__main__":
    run(main)
