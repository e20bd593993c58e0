"""VQModel and VQModelInterface on taming-transformers' quantizer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from ldm.models.autoencoder import VQModel, VQModelInterface
from ldm.util import UserError
from tests.ldm.models.test_autoencoder import trainer

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


LOSS = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": {"disc_start": 0, "disc_num_layers": 1, "disc_in_channels": 3, "codebook_weight": 1.0,
               "disc_conditional": False, "disc_weight": 0.75},
}  # fmt: skip


def vq_model(perceptual_weight: float = 0.0, **changes: Any) -> VQModel:
    torch.manual_seed(0)
    loss = {**LOSS, "params": {**LOSS["params"], "perceptual_weight": perceptual_weight}}
    return VQModel(**{**PARAMS, "lossconfig": loss, **changes})


def test_vqmodel_of_a_published_config_builds() -> None:
    model = VQModel(**{**PARAMS, "lossconfig": LOSS})
    assert model.loss.perceptual_weight == 1.0
    with pytest.raises(UserError, match="perceptual_ckpt"):
        model.setup("fit")


@torch.no_grad()
def test_vqmodel_quantizes_as_the_interface_does() -> None:
    model, interface = vq_model().eval(), VQModelInterface(**PARAMS).eval()
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("loss.")}
    interface.load_state_dict(own)
    x = torch.randn(2, 3, 16, 16)
    quantized, loss, (_, _, indices) = model.encode(x)
    torch.testing.assert_close(model.decode(quantized), interface.decode(interface.encode(x)))
    torch.testing.assert_close(model.decode_code(indices.view(2, 8, 8)), model.decode(quantized), rtol=1e-4, atol=1e-4)
    prequant = model.encode_to_prequant(x)
    # Both halves of eq. 4 have one value: the mean square distance to the entries, once whole and once times β.
    assert loss.item() == pytest.approx(1.25 * (quantized - prequant).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("use_ema", [False, True])
def test_vqmodel_trains_both_players(use_ema: bool, tmp_path: Path) -> None:
    model = vq_model(
        use_ema=use_ema,
        lr_g_factor=2.0,
        batch_resize_range=[16, 32],
        scheduler_config={
            "target": "ldm.lr_scheduler.LambdaLinearScheduler",
            "params": {"warm_up_steps": [1], "cycle_lengths": [4], "f_start": [1.0], "f_max": [1.0], "f_min": [0.0]},
        },
    )
    model.learning_rate = 1e-3
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.rand(4, 2, 16, 16, 3) * 2 - 1
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    trainer(tmp_path, max_epochs=1).fit(model, DataLoader([{"image": batch} for batch in images], batch_size=None))
    assert seen[:2] == [32, 32]  # the largest size first
    assert model.autoencoder_steps == 4
    after = model.state_dict()
    for part in ("encoder.conv_in.weight", "quantize.embedding.weight", "loss.discriminator.main.0.weight"):
        assert not torch.equal(before[part], after[part]), part
    generator, discriminator = model.trainer.optimizers
    assert generator.param_groups[0]["lr"] == 2 * discriminator.param_groups[0]["lr"] < 2e-3
    logged = model.log_images({"image": images[0]}, N=1)
    assert set(logged) == {"inputs", "reconstructions", *(["reconstructions_ema"] if use_ema else [])}


def test_vqmodel_with_a_frozen_encoder_keeps_its_codebook(tmp_path: Path) -> None:
    model = vq_model(use_ema=True, freeze_encoder=True)
    model.learning_rate = 1e-3
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.rand(2, 2, 16, 16, 3) * 2 - 1
    trainer(tmp_path, max_epochs=1).fit(model, DataLoader([{"image": batch} for batch in images], batch_size=None))
    after = model.state_dict()
    assert after.keys() == before.keys() == vq_model(use_ema=True).state_dict().keys()
    changed = {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])}
    assert changed == {"decoder", "post_quant_conv", "loss", "model_ema"}
