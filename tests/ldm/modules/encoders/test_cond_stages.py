"""Cond stages without a network."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.encoders.cond_stages import AbstractEncoder, ClassEmbedder, DummyEncoder, IdentityEncoder
from ldm.util import UserError


def test_dummy_encoder() -> None:
    t5 = torch.randn(2, 77, 8)
    encoder = DummyEncoder(key="t5")
    assert encoder.encode({"t5": t5}) is t5
    assert encoder(t5) is t5
    with pytest.raises(UserError, match="cond_stage_config: key 't5' is not in the batch, which has f8, txt"):
        encoder({"f8": t5, "txt": t5})


def test_class_embedder() -> None:
    encoder = ClassEmbedder(embed_dim=8, n_classes=10, key="label")
    labels = torch.tensor([3, 7])
    assert torch.equal(encoder({"label": labels}), encoder.embedding.weight[labels][:, None])
    assert torch.equal(encoder.encode({"other": labels}, key="other"), encoder(labels))
    assert list(encoder.state_dict()) == ["embedding.weight"]


def test_freezing_an_encoder() -> None:
    encoder: AbstractEncoder = ClassEmbedder(embed_dim=8)
    encoder.freeze()
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_identity_encoder() -> None:
    assert IdentityEncoder().encode("a cat") == "a cat"


def test_class_embedder_drops_labels_in_training() -> None:
    encoder = ClassEmbedder(embed_dim=8, n_classes=10, ucg_rate=0.5)
    labels = torch.zeros(2000, dtype=torch.long)
    torch.manual_seed(0)
    dropped = (encoder(labels) == encoder.embedding.weight[9]).all(dim=2).float().mean()
    assert 0.45 < float(dropped) < 0.55
    kept = encoder.embedding.weight[labels][:, None]
    assert torch.equal(encoder(labels, disable_dropout=True), kept)
    assert torch.equal(encoder.eval()(labels), kept)
    assert encoder.get_unconditional_conditioning(2)["class"].tolist() == [9, 9]
    with pytest.raises(UserError, match="ucg_rate 2"):
        ClassEmbedder(embed_dim=8, ucg_rate=2)
