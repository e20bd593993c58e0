"""Tests of the decay to the start by hand, on one parameter, and of its refusals."""

import logging

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.callbacks import start_weights
from ldm.callbacks.decay_to_start import DecayToStart
from ldm.checkpoint import save_state_dict
from ldm.modules.ema import LitEma
from ldm.util import UserError

DATA = [torch.tensor(float(i)) for i in range(6)]


class Pulled(pl.LightningModule):
    """Module with two weights of gradient 1 and a rate that halves from 0.5 per step. Records the weights per step."""

    def __init__(self, dtype=torch.float32, stop=None, checkpoint=None, **options) -> None:
        super().__init__()
        self.inner = torch.nn.ParameterList([torch.nn.Parameter(torch.full((2,), 3.0, dtype=dtype))])
        self.logvar = torch.nn.Parameter(torch.zeros(1))
        self.ema = LitEma(self.inner, decay=0.0)  # equal to the weights that it saw last
        self.stop, self.checkpoint, self.options, self.seen = stop, checkpoint, options, []

    def training_step(self, batch, batch_idx):
        return self.inner[0].float().sum() + self.logvar.sum()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.5, **self.options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.ema(self.inner)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(self.inner[0].tolist())
        if len(self.seen) == self.stop:
            self.trainer.save_checkpoint(self.checkpoint)
            self.trainer.should_stop = True


def fit(module, folder, callback, ckpt_path=None, steps=4, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        **quiet, max_steps=steps, enable_checkpointing=False, default_root_dir=folder, callbacks=[callback], **options
    )
    trainer.fit(module, DataLoader(DATA), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


@pytest.fixture
def start(tmp_path):
    path = tmp_path / "start.safetensors"
    save_state_dict({"inner.0": torch.tensor([1.0, -1.0]).half(), "of.another.part": torch.zeros(5)}, path)
    return path


def by_hand(steps, weight, every):
    """Return the weights by θ ← θ − lr and, every n steps, θ ← θ − lr · n · λ · (θ − θ⁰)."""
    theta, seen = [3.0, 3.0], []
    for step in range(1, steps + 1):
        rate = 0.5**step
        theta = [value - rate for value in theta]
        if step % every == 0:
            share = rate * every * weight
            theta = [value - share * (value - begun) for value, begun in zip(theta, (1.0, -1.0), strict=True)]
        seen.append(theta)
    return seen


@pytest.mark.parametrize("every", [1, 3])
def test_the_steps_by_hand(start, tmp_path, every):
    module = Pulled()
    fit(module, tmp_path, DecayToStart(str(start), 0.25, every), steps=6)
    torch.testing.assert_close(torch.tensor(module.seen), torch.tensor(by_hand(6, 0.25, every)))
    assert torch.equal(module.ema.get_buffer("0"), module.inner[0])  # the average saw the weights after the decay
    assert module.logvar.item() == pytest.approx(-sum(0.5**step for step in range(1, 7)))  # a release has none


def test_DecayToStart_takes_the_names_of_other_programs(tmp_path):
    path, module = tmp_path / "other.safetensors", Pulled()
    save_state_dict({"module.inner.0": torch.tensor([1.0, -1.0])}, path)
    fit(module, tmp_path, DecayToStart(str(path), 0.25, 1), steps=2)
    torch.testing.assert_close(torch.tensor(module.seen), torch.tensor(by_hand(2, 0.25, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_type(start, tmp_path, dtype):
    module = Pulled(dtype)
    fit(module, tmp_path, DecayToStart(str(start), 0.25))
    assert module.inner[0].dtype == dtype
    torch.testing.assert_close(torch.tensor(module.seen), torch.tensor(by_hand(4, 0.25, 1)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_decays_at_the_same_steps(start, tmp_path, stop):
    whole, first, second = Pulled(), Pulled(stop=stop, checkpoint=tmp_path / "last.ckpt"), Pulled()
    fit(whole, tmp_path, DecayToStart(str(start), 0.25, 2), steps=5)
    fit(first, tmp_path, DecayToStart(str(start), 0.25, 2), steps=5)
    fit(second, tmp_path, DecayToStart(str(start), 0.25, 2), tmp_path / "last.ckpt", steps=5)
    assert first.seen + second.seen == whole.seen


def test_accumulated_batches_are_one_step(start, tmp_path):
    module = Pulled()
    fit(module, tmp_path, DecayToStart(str(start), 0.25, 2), steps=2, accumulate_grad_batches=2)
    torch.testing.assert_close(torch.tensor(module.seen[3::2]), torch.tensor(by_hand(2, 0.25, 2)[1:]))


def test_a_second_fit_decays_once_per_step(start, tmp_path):
    callback = DecayToStart(str(start), 0.25)
    fit(Pulled(), tmp_path, callback)
    module = Pulled()
    trainer = fit(module, tmp_path, callback)
    torch.testing.assert_close(torch.tensor(module.seen), torch.tensor(by_hand(4, 0.25, 1)))
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_the_file_is_not_held_in_memory(start, tmp_path, monkeypatch):
    read = []
    in_memory = start_weights.in_memory
    monkeypatch.setattr(start_weights, "in_memory", lambda tensor: read.append(tensor) or in_memory(tensor))
    fit(Pulled(), tmp_path, DecayToStart(str(start), 0.25), steps=3)
    assert len(read) == 3  # the one parameter that it holds, three times
    assert all(in_memory(tensor) is not tensor for tensor in read)  # each was read from the file


def test_a_second_decay_towards_zero_gives_a_warning(start, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        fit(Pulled(), tmp_path, DecayToStart(str(start), 0.25))
        assert "weight_decay" not in caplog.text
        fit(Pulled(weight_decay=0.01), tmp_path, DecayToStart(str(start), 0.25))
    (record,) = [record for record in caplog.records if "weight_decay" in record.getMessage()]
    assert "weight_decay 0.01 pulls to zero" in record.getMessage() and "\n" not in record.getMessage()


def test_weight_decay_sets_the_optimizers_own_decay(start, tmp_path, caplog):
    without, instead = Pulled(), Pulled(weight_decay=0.01)
    fit(without, tmp_path, DecayToStart(str(start), 0.25))
    fit(instead, tmp_path, DecayToStart(str(start), 0.25, weight_decay=0.0))
    assert instead.seen == without.seen
    assert "weight_decay" not in caplog.text


def test_bfloat16_weights_decay_on_average_by_less_than_their_precision(start):
    weights = torch.nn.Parameter(torch.full((100_000,), 3.0, dtype=torch.bfloat16))  # the next ones: 1/64 away
    optimizer = torch.optim.SGD([weights], 1.0)
    DecayToStart(str(start), 0.001)._pull(optimizer, {weights: torch.ones(100_000)}, seed=0)
    assert weights.dtype == torch.bfloat16 and set(weights.tolist()) == {3.0, 3.0 - 1 / 64}
    assert weights.double().mean().item() == pytest.approx(3.0 - 0.001 * 2.0, abs=1e-4)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (
            {"inner.0": torch.zeros(3)},
            {},
            r"start\.ckpt: inner\.0 has the shape \(3,\), and the trained weight has \(2,\)",
        ),
        ({"other": torch.zeros(2)}, {}, r"start\.ckpt: inner\.0 is missing, and the trained weight has \(2,\)"),
        (None, {}, r"start\.ckpt: no such file"),
        ({"inner.0": torch.zeros(2)}, {"weight": 5.0}, r"weight 5\.0 .* is 2\.5, which overshoots"),
        ({"inner.0": torch.zeros(2)}, {"weight": 0}, "weight 0: give a number above 0"),
        ({"inner.0": torch.zeros(2)}, {"every_n_steps": 0}, "every_n_steps 0"),
    ],
)
def test_a_file_or_value_that_does_not_fit_is_refused_in_one_line(tmp_path, weights, options, message):
    path = tmp_path / "start.ckpt"
    if weights is not None:
        torch.save(weights, path)
    with pytest.raises(UserError, match=message) as caught:
        fit(Pulled(), tmp_path, DecayToStart(str(path), **{"weight": 0.25, **options}))
    assert "\n" not in str(caught.value)
