"""VQModelInterface on taming-transformers' quantizer."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from ldm.models.autoencoder import VQModelInterface
from ldm.util import UserError

PARAMS: dict[str, Any] = {
    "embed_dim": 3,
    "n_embed": 16,
    "monitor": "val/rec_loss",
    "ddconfig": {
        "double_z": False,
        "z_channels": 3,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
    "lossconfig": {"target": "torch.nn.Identity"},
}


@torch.no_grad()
def test_decoding_quantizes_to_the_nearest_entry() -> None:
    torch.manual_seed(0)
    model = VQModelInterface(**PARAMS).eval()
    h = model.encode(torch.randn(2, 3, 16, 16))
    assert h.shape == (2, 3, 8, 8)

    codebook = model.quantize.embedding.weight
    flat = h.movedim(1, -1).reshape(-1, 3)
    nearest = codebook[torch.cdist(flat, codebook).argmin(dim=1)].reshape(2, 8, 8, 3).movedim(-1, 1)
    decoded = model.decode(h)
    assert decoded.shape == (2, 3, 16, 16)
    torch.testing.assert_close(decoded, model.decode(nearest, force_not_quantize=True))
    assert not torch.allclose(decoded, model.decode(h, force_not_quantize=True))


def test_state_dict_names() -> None:
    top = {key.split(".")[0] for key in VQModelInterface(**PARAMS).state_dict()}
    assert top == {"encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"}


def test_without_taming(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "taming"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "taming", None)
    with pytest.raises(UserError, match="pip install --no-deps taming-transformers-rom1504"):
        VQModelInterface(**PARAMS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"lossconfig": {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"}},
            "torch.nn.Identity",
        ),
        ({"ddconfig": {**PARAMS["ddconfig"], "double_z": True}}, "double_z must be false"),
    ],
)
def test_bad_options(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        VQModelInterface(**{**PARAMS, **change})
