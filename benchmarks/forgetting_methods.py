"""Ways to train that `forgetting.py` compares, each as additions to the common command."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from forgetting_sets import CONFIG, FAMILIES, RELEASE


@dataclass(frozen=True)
class Variant:
    """A way to train, one row of the tables, given by its additions to the common command."""

    name: str
    overrides: tuple[str, ...] = ()
    prior: str | None = None  # a set of `forgetting_sets`
    ratio: float = 0.5  # prior samples per image of a batch of 16; the subject is one batch
    training: str = "subject"  # the set that is learnt
    configs: tuple[str, ...] = ("demo_tiny.yaml",)
    extract: int | None = None  # rank of a LoRA that is extracted from the result, and judged in its place
    families: tuple[str, ...] = tuple(FAMILIES)

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower())

    def start(self, folder: Path) -> Path:
        """Return the checkpoint to resume."""
        return folder / f"{Path(self.configs[-1]).stem}.ckpt"


def decay(weight: float) -> tuple[str, ...]:
    """Return overrides that decay weights to the released ones, and switch the optimizer's decay to zero off."""
    return (
        "lightning.callbacks.decay.target=ldm.callbacks.decay_to_start.DecayToStart",
        f"lightning.callbacks.decay.params.start={RELEASE}",
        f"lightning.callbacks.decay.params.weight={weight}",
        "model.params.optimizer_config.target=torch.optim.AdamW",
        "model.params.optimizer_config.params.weight_decay=0.0",
    )


def pull(weight: float) -> tuple[str, ...]:
    """Return overrides that pull weights to the released ones, normalised per tensor, in the loss."""
    return tuple(word.replace("decay_to_start.DecayToStart", "pull_to_start.PullToStart") for word in decay(weight))


def consistency(beta: float) -> tuple[str, ...]:
    """Return overrides for direct consistency on a training set with stored predictions."""
    target = "ldm.models.diffusion.consistency.DirectConsistency"
    loss = "model.params.loss_config"
    return f"{loss}.target={target}", f"{loss}.params.beta={beta}", "data.params.null_cond_dropout=0"


TEACHER = ("model.params.prior_target=teacher",)
SPLIT = ("model.params.timestep_config.target=ldm.models.diffusion.timesteps.Split",)
INVERSION = (
    "model.params.cond_stage_config.params.token=tom",
    "model.params.cond_stage_config.params.initial_token=tiger",  # the closest word that the base has learnt
    "data.params.batch_size=16",  # all cats in one batch, as in the other variants
    "model.base_learning_rate=6.25e-4",  # times batch_size: 0.01
)
LORA = ("model.base_learning_rate=3.0e-4",)  # ten times that of all weights
# The first is the one that the others are compared with.
VARIANTS = (
    Variant("plain"),
    Variant("decay to start, 30", decay(30)),
    Variant("pull, 600", pull(600)),
    Variant("pull, 1000", pull(1000)),
    Variant("direct consistency", consistency(5), training="subject_taught"),
    Variant("prior: real images", prior="real"),
    Variant("prior: generated images", prior="generated"),
    Variant("teacher, real images", TEACHER, prior="real_taught"),
    Variant("teacher, generated images", TEACHER, prior="generated_taught"),
    Variant("LoRA, attention", LORA, configs=("demo_tiny.yaml", "lora.yaml")),
    Variant("LoRA, all layers", (*LORA, "model.params.lora.targets=['*']"), configs=("demo_tiny.yaml", "lora.yaml")),
    Variant("LoRA extracted from plain, rank 32", extract=32),
    Variant("teacher, others", TEACHER, prior="others_taught", ratio=1.0),
    Variant("teacher, known", TEACHER, prior="known_taught", ratio=1.0),
    Variant("teacher, known, split", (*TEACHER, *SPLIT), prior="known_falling", ratio=1.0),
    Variant("teacher, known, pull 300", (*TEACHER, *pull(300)), prior="known_taught", ratio=1.0),
    Variant("teacher, known, split, pull 300", (*TEACHER, *SPLIT, *pull(300)), prior="known_falling", ratio=1.0),
    Variant("teacher, own images", TEACHER, prior="own_taught", ratio=1.0),
    Variant("teacher, own images, pull 300", (*TEACHER, *pull(300)), prior="own_taught", ratio=1.0),
    Variant("teacher, near alone", TEACHER, prior="near_alone_taught", ratio=1.0),
    Variant("teacher, few", TEACHER, prior="few_taught", ratio=1.0),
    Variant("teacher, all", TEACHER, prior="all_taught", ratio=1.0),
    Variant("teacher, known, ratio 0.5", TEACHER, prior="known_taught", ratio=0.5),
    Variant("teacher, known, ratio 2", TEACHER, prior="known_taught", ratio=2.0),
    Variant("textual inversion", INVERSION, configs=(CONFIG, "textual_inversion.yaml"), families=("cats",)),
)
