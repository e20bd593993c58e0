"""Command lines that the studio runs, as lists of words. Nothing passes through a shell. Imports no torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.printable import escaped
from ldm.util import refuse_if

ROOT = Path(__file__).resolve().parents[2]
_NAME = re.compile(r"\w[\w.-]{0,79}", re.ASCII)


@dataclass(frozen=True)
class Step:
    """Command of a job: its title and its words, without the name of the Python interpreter."""

    title: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        """Return the command as a user types it into a shell."""
        return shlex.join(["python", *self.words])


def shown(steps: Sequence[Step]) -> str:
    """Return the commands of `steps` for a shell. If there are several, each has its title before it as a comment."""
    if len(steps) == 1:
        return str(steps[0])
    return "\n\n".join(f"# {escaped(step.title)}\n{step}" for step in steps)


@dataclass(frozen=True)
class TrainingRecipe:
    """Values that determine a training, from images to `logs/<time>_<name>/`.

    `config` and `base` are the configs of the release and of its training. `overrides` are changes `a.b.c=value` to
    `base`, and `is_family` tells that both are those of the release's family. Empty texts, None and 0 stand for the
    default of the tools.
    """

    name: str
    images: str
    release: str
    base: str
    config: str = ""
    overrides: tuple[str, ...] = ()
    is_family: bool = False
    predicts: str = ""  # eps or v
    size: int = 0  # pixels
    flip: bool = False
    overwrite: bool = False
    tier: str = ""
    batch: int = 0
    steps: int = 0
    minutes: float = 0  # limit of the training's time
    rate: float = 0  # base_learning_rate
    prompts: tuple[str, ...] = ()  # of previews
    preview_steps: int = 0  # optimizer steps between previews
    gpu: bool = False
    work: Path = Path("outputs/studio")

    def __post_init__(self) -> None:
        check_name("name of the run", self.name)

    @property
    def folder(self) -> Path:
        """Folder of the files that lead to the training."""
        return self.work / self.name

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def start(self) -> Path:
        return self.folder / "start.ckpt"

    @property
    def yaml(self) -> Path:
        return self.folder / "recipe.yaml"


def check_name(what: str, name: str) -> None:
    """Raise `UserError` unless `name` is a plain file name. `what` names it in the message."""
    refuse_if(
        not _NAME.fullmatch(name),
        f"{what} {name!r:.100}: use up to 80 letters, digits, _, . and -, beginning with a letter or digit",
    )


def path_word(path: str | Path) -> str:
    """Return `path` as a word that no option can be confused with: `./-x` for `-x`."""
    text = str(path)
    return f"./{text}" if text.startswith("-") else text


def option(name: str, value: Any) -> tuple[str, ...]:
    """Return the words of an option, none for an empty value, and `--name=-x` for a value that begins with a dash."""
    text = str(value)
    if value is None or text == "" or value is False or (value == 0 and not isinstance(value, str)):
        return ()
    if value is True:
        return (name,)
    return (f"{name}={text}",) if text.startswith("-") else (name, text)


def tool(name: str, *words: str) -> tuple[str, ...]:
    """Return the words that run the script `name` of this repository, with its path if that is not here."""
    return (name if Path.cwd() == ROOT else str(ROOT / name), *words)


def plan_words(recipe: TrainingRecipe, card: float, ram: float = 0) -> tuple[str, ...]:
    """Return the command that tells which tiers fit a card of `card` GB."""
    return tool(
        "tools/plan_memory.py",
        *("--base", path_word(recipe.base)),
        *recipe.overrides,
        *(*option("--card", f"{card:g}"), *(option("--ram", f"{ram:g}") if ram else ())),
        *option("--size", recipe.size),
        "--json",
    )


def preencode_words(recipe: TrainingRecipe) -> tuple[str, ...]:
    """Return the command that encodes the images of `recipe`."""
    return tool(
        "tools/preencode.py",
        *("--ckpt", path_word(recipe.release)),
        *(option("--config", recipe.config and path_word(recipe.config))),
        *option("--parameterization", recipe.predicts),
        *("--images", path_word(recipe.images)),
        *("--out", path_word(recipe.shards / "%06d.tar")),
        *option("--size", recipe.size),
        *option("--flip", recipe.flip),
        *option("--overwrite", recipe.overwrite),
    )


def hack_words(recipe: TrainingRecipe) -> tuple[str, ...]:
    """Return the command that makes the checkpoint from which the training of `recipe` starts."""
    return tool(
        "tools/hack_weights.py",
        *("--release", path_word(recipe.release)),
        *option("--parameterization", recipe.predicts),
        *("--out", path_word(recipe.start)),
        *("--base", *(() if recipe.is_family else (path_word(recipe.base),))),
    )


def train_words(recipe: TrainingRecipe) -> tuple[str, ...]:
    """Return the command that trains `recipe`."""
    configs = [path_word(name) for name in (recipe.base, recipe.tier, recipe.yaml) if name]
    return tool(
        "main.py",
        *("--resume", path_word(recipe.start)),
        *("--base", *configs, "-t", "--no-test"),
        *(("--gpus", "0,") if recipe.gpu else ()),
        *("--name", recipe.name),
        *recipe.overrides,
    )


def resume_words(run: str | Path, gpu: bool = False) -> tuple[str, ...]:
    """Return the command that continues the run in the folder `run`."""
    return tool("main.py", "--resume", path_word(run), "-t", "--no-test", *(("--gpus", "0,") if gpu else ()))


def pipeline(recipe: TrainingRecipe) -> list[Step]:
    """Return the commands from images to a trained run."""
    return [
        Step("Encode images and captions", preencode_words(recipe)),
        Step("Put the released weights into a training checkpoint", hack_words(recipe)),
        Step("Train", train_words(recipe)),
    ]


def recipe_values(recipe: TrainingRecipe) -> dict[str, Any]:
    """Return the content of the config that `train_words` gives last."""
    values: dict[str, Any] = {"data": {"params": {"training_urls": f"{recipe.shards}/*.tar"}}}
    if recipe.rate:
        values["model"] = {"base_learning_rate": recipe.rate}
    if recipe.batch:
        values["data"]["params"]["batch_size"] = recipe.batch
    trainer: dict[str, Any] = {"max_steps": recipe.steps} if recipe.steps else {}
    if recipe.minutes:
        minutes, seconds = divmod(round(recipe.minutes * 60), 60)
        hours, minutes = divmod(minutes, 60)
        trainer["max_time"] = f"{hours // 24:02}:{hours % 24:02}:{minutes:02}:{seconds:02}"
    lightning: dict[str, Any] = {"trainer": trainer} if trainer else {}
    if recipe.prompts:
        previews: dict[str, Any] = {"prompts": list(recipe.prompts)}
        if recipe.preview_steps:
            previews["every_n_train_steps"] = recipe.preview_steps
        if recipe.config:
            previews["config"] = recipe.config
        lightning["previews"] = previews
    return {**values, **({"lightning": lightning} if lightning else {})}


def merge_words(
    run: Path, release: str | Path, out: str, config: str, weights: str, half: bool, strength: float
) -> tuple[str, ...]:
    """Return the command that merges the run in the folder `run` into a release. `config` is for a folder alone."""
    return tool(
        "tools/merge_release.py",
        *("--train-ckpt", path_word(run / "checkpoints" / "last.ckpt")),
        *("--release", path_word(release)),
        *("--out", path_word(out)),
        *(option("--config", config and path_word(config)) if out.endswith("/") else ()),
        *option("--weights", weights),
        *option("--half", half),
        *(("--strength", f"{strength:g}") if strength != 1 else ()),
    )


def report_words(run: Path) -> tuple[str, ...]:
    """Return the command that writes the report of the run in the folder `run`."""
    return tool("tools/report.py", path_word(run))


def inspect_words(images: str | Path, size: int, out: Path) -> tuple[str, ...]:
    """Return the command that looks for problems of images, and writes them to the JSON file `out`."""
    words = (path_word(images), *option("--size", size), *("--json", path_word(out)))
    return tool("tools/inspect_images.py", *words)


@dataclass(frozen=True)
class SampleSettings:
    """Settings of the images that a comparison samples."""

    prompts: tuple[str, ...]
    seed: int
    count: int  # images per prompt
    steps: int
    scale: float
    sampler: str


def sample_words(
    release: str | Path, config: str, predicts: str, sampling: SampleSettings, out: Path
) -> tuple[str, ...]:
    """Return the command that samples images from `release` into the folder `out`."""
    has_dash = any(prompt.startswith("-") for prompt in sampling.prompts)
    prompts = [f"--prompt={text}" for text in sampling.prompts] if has_dash else ["--prompt", *sampling.prompts]
    return tool(
        "tools/txt2img.py",
        *("--ckpt", path_word(release)),
        *option("--config", config and path_word(config)),
        *option("--parameterization", predicts),
        *prompts,
        *("--n", str(sampling.count), "--seed", str(sampling.seed), "--steps", str(sampling.steps)),
        *(f"--scale={sampling.scale:g}", "--sampler", sampling.sampler),
        *("--out", path_word(out)),
    )


def evaluate_words(
    base: str | Path, tuned: str | Path, config: str, predicts: str, sets: Sequence[str], out: Path
) -> tuple[str, ...]:
    """Return the command that measures what a training changed on `sets`, each `NAME=SHARDS`."""
    return tool(
        "tools/evaluate.py",
        *("--base", path_word(base), "--ckpt", path_word(tuned)),
        *option("--config", config and path_word(config)),
        *option("--parameterization", predicts),
        *(word for text in sets for word in option("--set", text)),
        *("--out", path_word(out)),
    )


def lora_words(base: str | Path, tuned: str | Path, out: str, rank: int, half: bool) -> tuple[str, ...]:
    """Return the command that extracts the difference of two releases as a LoRA."""
    return tool(
        "tools/extract_lora.py",
        *("--base", path_word(base), "--tuned", path_word(tuned), "--out", path_word(out)),
        *option("--rank", rank),
        *option("--half", half),
    )
