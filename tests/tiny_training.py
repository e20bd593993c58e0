"""Training of the families' tiny models on shards: the shipped configs to fine-tune them, with small networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from ldm.config.load import load_config, plain
from ldm.release.families import FAMILIES
from tests.tiny_families import shrink, tiny_config

ENCODED = tuple(FAMILIES)


def finetune_config(key: str, shards: Path | str, release: Path | None = None) -> dict[str, Any]:
    """Return the config that fine-tunes the family `key`, for its tiny model from `release` on pre-encoded `shards`."""
    config, tiny = plain(load_config([FAMILIES[key].finetune_config])), tiny_config(key)["model"]["params"]
    config["model"]["base_learning_rate"] = 1e-3
    params = config["model"]["params"]
    params |= {name: tiny[name] for name in ("unet_config", "first_stage_config", "image_size")}
    params |= {"use_ema": True, "ckpt_path": release and str(release)}
    shrink(params["cond_stage_config"])
    config["data"]["params"] |= {"batch_size": 2, "num_workers": 0, "training_urls": str(shards)}
    config["lightning"] = {
        "callbacks": {"image_logger": {"params": {"disabled": True}}},
        "report": False,
        "trainer": {"log_every_n_steps": 1, "enable_model_summary": False},
    }
    return config


def write_config(config: dict[str, Any], path: Path) -> Path:
    OmegaConf.save(OmegaConf.create(config), path)
    return path


def write_images(folder: Path, key: str, count: int = 4, side: int = 80) -> Path:
    """Noisy images with captions, the last one empty; pairs of them for a family that edits."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        for ending in ("", ".edited") if key == "instruct_pix2pix" else ("",):
            pixels = random.integers(0, 256, (side, side + 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"p{number}{ending}.png")
        (folder / f"p{number}.txt").write_text(f"image {number}" if number < count - 1 else "")
    return folder
