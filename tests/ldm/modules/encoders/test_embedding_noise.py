"""Noise on the embeddings of images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.modules.diffusionmodules.layers import timestep_embedding
from ldm.modules.encoders.modules import CLIPEmbeddingNoiseAugmentation
from ldm.util import UserError

SCHEDULE = {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


def test_noise_is_added_to_scaled_embeddings(tmp_path: Path) -> None:
    mean, std = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 1.0])
    torch.save((mean, std), tmp_path / "stats.th")
    stage = CLIPEmbeddingNoiseAugmentation(SCHEDULE, clip_stats_path=str(tmp_path / "stats.th"), timestep_dim=4)
    x, noise, levels = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 500, 998, 999])
    noised, level = stage(x, levels, noise)
    scaled = (x - mean) / std
    alpha, sigma = (getattr(stage, name)[levels, None] for name in ("sqrt_alphas_cumprod",
                    "sqrt_one_minus_alphas_cumprod"))  # fmt: skip
    torch.testing.assert_close(noised, (alpha * scaled + sigma * noise) * std + mean)
    torch.testing.assert_close(level, timestep_embedding(levels, 4))
    assert not any("data_" in key for key in stage.state_dict())
    sampled, level = stage(x)
    assert sampled.shape == (5, 3) and level.shape == (5, 4)


def test_missing_stats_build_but_embed_nothing(tmp_path: Path) -> None:
    stage = CLIPEmbeddingNoiseAugmentation(SCHEDULE, clip_stats_path="nowhere.th")
    with pytest.raises(UserError, match=r"clip_stats_path 'nowhere.th': no such file"):
        stage(torch.zeros(1, 3))
    torch.save((torch.zeros(4), torch.ones(4)), tmp_path / "four.th")
    stage = CLIPEmbeddingNoiseAugmentation(SCHEDULE, clip_stats_path=str(tmp_path / "four.th"))
    with pytest.raises(UserError, match=r"clip_stats_path: has 4 features; the image tower has 3"):
        stage(torch.zeros(1, 3))


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.zeros(3),
        (torch.zeros(3), torch.zeros(3)),
        (torch.full((3,), torch.nan), torch.ones(3)),
        (torch.zeros(3), torch.full((3,), torch.inf)),
        {"a": 1},
    ],
)
def test_files_of_other_content_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.th")
    with pytest.raises(UserError, match=r"clip_stats_path '.*other.th': "):
        CLIPEmbeddingNoiseAugmentation(SCHEDULE, clip_stats_path=str(tmp_path / "other.th"))
    (tmp_path / "other.th").write_text("no")
    with pytest.raises(UserError, match=r"clip_stats_path '.*other.th': not a pair"):
        CLIPEmbeddingNoiseAugmentation(SCHEDULE, clip_stats_path=str(tmp_path / "other.th"))
