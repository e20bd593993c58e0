"""Command line of main.py. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ldm.config.command_line_values import parse_value
from ldm.config.trust import add_trust_option
from ldm.util import UserError, located, refuse_if

log = logging.getLogger(__name__)

DEFAULT_SEED = 23
_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)+=")
# Options for the initial weights in other projects' main.py of 2022.
_WEIGHTS = ("actual_resume", "finetune_from")
_TEXTUAL_INVERSION = ("data_root", "embedding_manager_ckpt", "init_word", "placeholder_string")
_NUMBER = re.compile(r"-\.?\d")

_EPILOG = """\
Every argument of Lightning's Trainer is an option too, under its present name or its name of 2022:
  --gpus 0,        GPU number 0 (0,1: two GPUs by number; 2: any two); without CUDA, the CPU
  --max_steps 1000 --precision bf16 --accumulate_grad_batches 4 --check_val_every_n_epoch 10 ...

Every value of the config is set by its path:
  model.base_learning_rate=1e-5 data.params.batch_size=2 lightning.callbacks.image_logger.params.disabled=True

Examples:
  python main.py --base finetune_stable_diffusion.yaml -t --gpus 0,
  python main.py --resume logs/<run> -t --gpus 0,
"""


@dataclass
class Arguments:
    """Parsed command line."""

    base: list[str]
    name: str | None
    resume: str | None
    train: bool
    no_test: bool
    project: str | None
    debug: bool
    seed: int | None  # None: the seed of the resumed run, or DEFAULT_SEED
    postfix: str
    logdir: Path
    scale_lr: bool | None  # None: the value of the resumed run, or True
    trust_config: bool
    previews: str | None = None  # text file of prompts
    trainer: dict[str, Any] = field(
        default_factory=dict
    )  # names and values are checked later, against Lightning's Trainer
    overrides: list[str] = field(default_factory=list)  # `a.b.c=value`


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse `argv`, the command line without the program's name.

    Raises:
        UserError: an option of main.py itself has a wrong value, or there is nothing to do.
        SystemExit: `--help` was given.
    """
    parser = _build_parser()
    own, trainer, overrides = _split(argv, parser)
    arguments = Arguments(**vars(parser.parse_args(own)), trainer=trainer, overrides=overrides)
    arguments.base = [_in_home(path) for path in arguments.base]
    arguments.logdir = Path(_in_home(str(arguments.logdir)))
    if arguments.resume is not None:
        arguments.resume = _in_home(arguments.resume)
    old = trainer.pop("resume_from_checkpoint", None)  # the name in Lightning 1
    refuse_if(
        old is not None and arguments.resume not in (None, str(old)),
        f"--resume {arguments.resume} and --resume_from_checkpoint {old} differ; give one of them",
    )
    if old is not None:
        arguments.resume = str(old)
    for name in _WEIGHTS:
        if name in trainer:
            overrides.append(f"model.params.ckpt_path={trainer.pop(name)}")
    if "find_unused_parameters" in trainer:
        overrides.append(f"lightning.find_unused_parameters={trainer.pop('find_unused_parameters')}")
    unsupported = [f"--{name}" for name in _TEXTUAL_INVERSION if name in trainer]
    if unsupported:
        raise UserError(
            f"{' and '.join(unsupported)}: not an option here; for textual inversion give textual_inversion.yaml "
            "with --base, set token and initial_token in its cond_stage_config, and pre-encode the images"
        )
    refuse_if(
        not arguments.base and not arguments.resume,
        "nothing to do: give a config with --base, or a run with --resume (see --help)",
    )
    refuse_if(
        arguments.no_test and not arguments.train,
        "nothing to do: --no-test without --train; give -t to train (see --help)",
    )
    if not arguments.train:
        log.info("Without -t there is no training; only the test set is evaluated, if there is one")
    return arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="main.py",
        description="Train a latent diffusion model or an autoencoder from YAML configs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    switch: dict[str, Any] = {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    add = parser.add_argument
    add("-n", "--name", help="name of the new run (default: name of the first config)")
    add("-r", "--resume", metavar="PATH", help="run folder or checkpoint to continue from")
    add("-b", "--base", metavar="YAML", nargs="*", action="extend", default=[], help="configs, merged left to right")
    add("-t", "--train", default=False, help="train", **switch)
    add("--no-test", "--no_test", default=False, help="do not evaluate the test set after training", **switch)
    add("-p", "--project", help="project of a Weights & Biases logger")
    add("-d", "--debug", default=False, help="on an error, open the Python debugger at its place", **switch)
    add("-s", "--seed", type=_seed, help=f"seed of all random numbers (default: {DEFAULT_SEED})")
    add("-f", "--postfix", default="", help="appended to the run's name")
    add("-l", "--logdir", type=Path, default=Path("logs"), help="parent of the run folders (default: logs)")
    add(
        "--scale_lr",
        help="multiply base_learning_rate by devices, batch size and accumulation; saved with the run (default: True)",
        **switch,
    )
    add("--previews", metavar="FILE", help="text file of prompts to sample while training, one per line, such as: "
        "a red apple --n blurry --w 512 --h 512 --d 42 --s 50 --l 7.5")  # fmt: skip
    add_trust_option(parser)
    return parser


def _in_home(path: str) -> str:
    """Return `path` with the home folder for `~`, which shells keep after an equals sign."""
    return os.path.expanduser(path) if path.startswith("~") and not os.path.lexists(path) else path  # noqa: PTH111


def _boolean(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def _seed(text: str) -> int:
    if text.isdecimal() and int(text) < 2**32:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {2**32 - 1}, got {text!r}")


def _split(argv: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], dict[str, Any], list[str]]:
    """Split `argv` into the tokens for `parser`, the Trainer's arguments by name, and the config overrides."""
    known = {flag for action in parser._actions for flag in action.option_strings}
    own: list[str] = []
    trainer: dict[str, Any] = {}
    overrides: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        flag, equals, value = token.partition("=")
        if _OVERRIDE.match(token):
            overrides.append(token)
        elif not token.startswith("--") or token == "--" or flag in known:
            own.append(token)
        else:
            if not equals:
                value = tokens.pop(0) if tokens and _is_value(tokens[0]) else "True"
            if "." in flag:
                overrides.append(f"{flag[2:]}={value}")
            else:
                trainer[flag[2:].replace("-", "_")] = _typed(flag, value)
    return own, trainer, overrides


def _is_value(token: str) -> bool:
    return not _OVERRIDE.match(token) and (not token.startswith("-") or bool(_NUMBER.match(token)))


def _typed(flag: str, text: str) -> Any:
    """Return `text` parsed by `parse_value`, except that the text `None` is None."""
    if text == "None":
        return None
    with located(flag):
        return parse_value(text)
