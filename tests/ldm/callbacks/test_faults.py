"""Tests of losses, gradients and weights that are not finite: messages, skipped steps and saved states."""

import io
import re
import tarfile

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from ldm.callbacks.faults import NumericalFault, NumericalFaults
from ldm.checkpoint import load_checkpoint
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError
from tests.training_runs import fixture_one_thread, fixture_train, the_run  # noqa: F401

NAN = float("nan")
_OPTIMIZER = "model.params.optimizer_config"
IN_BACKWARD = (
    f"{_OPTIMIZER}.target=ldm.optim.InBackward {_OPTIMIZER}.params.bucket_mb=0.1 "
    f"{_OPTIMIZER}.params.optimizer.target=torch.optim.AdamW"
)


class Slope(pl.LightningModule):
    """Module with one weight, whose gradient is the batch, and SGD with momentum and decay. Records the weight."""

    def __init__(self, checkpoint=None, **broken) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.checkpoint, self.broken, self.seen = checkpoint, broken, []

    def training_step(self, batch, batch_idx):
        return self.weight * batch["x"].sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.5, weight_decay=0.1)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(self.weight.item())
        if self.trainer.global_step == self.broken.get("weight"):
            self.weight.data.fill_(NAN)
        if self.trainer.global_step == self.broken.get("momentum"):
            self.trainer.optimizers[0].state[self.weight]["momentum_buffer"].fill_(float("inf"))
        if self.checkpoint and self.trainer.global_step in self.checkpoint:
            self.trainer.save_checkpoint(self.checkpoint[self.trainer.global_step])


def fit(module, values, folder, ckpt_path=None, accumulate=1, plugins=None, **params):
    data = [{"x": torch.tensor(value), "__key__": f"k{number}"} for number, value in enumerate(values)]
    trainer = pl.Trainer(
        callbacks=[NumericalFaults(**params)],
        plugins=plugins,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(data), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module.seen


def by_hand(gradients):
    """Return the weights by m ← 0.5 · m + g + 0.1 · w and w ← w − 0.1 · m; a gradient of None changes neither."""
    weight, momentum, seen = 1.0, None, []
    for gradient in gradients:
        if gradient is not None:
            pull = gradient + 0.1 * weight
            momentum = pull if momentum is None else 0.5 * momentum + pull
            weight -= 0.1 * momentum
        seen.append(weight)
    return seen


def test_without_faults_nothing_changes(tmp_path):
    for params in ({}, {"on_fault": "skip"}, {"grad_norm_factor": 10.0}):
        assert fit(Slope(), [1.0, 2.0, 3.0], tmp_path, **params) == pytest.approx(by_hand([1, 2, 3]))


def test_a_skipped_step_changes_neither_weight_nor_momentum(tmp_path, caplog):
    seen = fit(Slope(), [1.0, NAN, 2.0, float("inf"), 3.0], tmp_path, on_fault="skip")
    assert seen == pytest.approx(by_hand([1, None, 2, None, 3]))
    assert "Skipped step 2: loss nan, sample 'k1'" in caplog.text
    assert "Skipped step 4: loss inf, sample 'k3'" in caplog.text


def test_all_batches_of_a_faulty_step_are_skipped(tmp_path, caplog):
    values = [1.0, 3.0, NAN, 5.0, 2.0, 4.0]
    seen = fit(Slope(), values, tmp_path, accumulate=2, on_fault="skip")
    assert seen[1::2] == pytest.approx(by_hand([2, None, 3]))
    assert "Skipped step 2: loss nan, sample 'k2'" in caplog.text


def test_a_gradient_above_the_limit_is_skipped(tmp_path, caplog):
    """The limit follows the median of the last four good steps. The first four steps have no limit."""
    values = [9.0, 1.0, 1.0, 1.0, 3.0, 3.5, 1.0, 100.0]
    params = {"grad_norm_factor": 3.0, "window": 4, "on_fault": "skip"}
    seen = fit(Slope(), values, tmp_path, **params)
    assert seen == pytest.approx(by_hand([9, 1, 1, 1, 3, None, 1, None]))
    assert "Skipped step 6: gradient norm 3.5, 3.5 times the usual 1; loss" in caplog.text
    with pytest.raises(NumericalFault) as caught:  # and blames no sample of the steps since losses were looked at
        fit(Slope(), values, tmp_path, **params | {"on_fault": "stop"})
    assert re.fullmatch(
        r"step 6: gradient norm 3\.5, 3\.5 times the usual 1; loss [-\d.]+, sample 'k5'; "
        r"resume the last checkpoint with --resume",
        str(caught.value),
    )


def test_the_message_of_a_large_gradient_names_all_batches_of_its_step(tmp_path):
    params = {"grad_norm_factor": 3.0, "window": 2, "on_fault": "stop"}
    with pytest.raises(NumericalFault, match=r"usual 1; loss \S+, sample 'k4'; loss \S+, sample 'k5'; resume"):
        fit(Slope(), [1.0, 1.0, 1.0, 1.0, 5.0, 2.0], tmp_path, accumulate=2, **params)


def test_a_resumed_run_skips_the_same_steps(tmp_path):
    values = [1.0, 1.0, 1.0, 1.0, 9.0, 1.0, NAN, 2.0]
    params = {"grad_norm_factor": 3.0, "window": 4, "on_fault": "skip"}
    whole = fit(Slope({4: tmp_path / "4.ckpt"}), values, tmp_path, **params)
    assert whole == pytest.approx(by_hand([1, 1, 1, 1, None, 1, None, 2]))
    state = torch.load(tmp_path / "4.ckpt", weights_only=True)["callbacks"]["NumericalFaults"]
    assert state == {"norms": [1.0] * 4, "skipped": 0}
    rest = values[4:] + values[:4]  # a plain loader begins again
    assert fit(Slope(), rest, tmp_path, tmp_path / "4.ckpt", **params) == whole[4:]


def test_too_many_consecutive_skips_stop_training(tmp_path):
    values = [1.0, NAN, NAN, 1.0, NAN, NAN, NAN, 1.0]
    with pytest.raises(NumericalFault, match=r"step 7: .*'k6' \(3 consecutive steps skipped\)"):
        fit(Slope(), values, tmp_path, on_fault="skip", most_skips=3)


def test_the_first_fault_of_several_batches_is_named(tmp_path):
    for every, reached in ((1, 1), (4, 3), (100, 6)):
        module = Slope()
        with pytest.raises(NumericalFault, match=r"^step 2: loss nan, sample 'k1'; the step was not saved"):
            fit(module, [1.0, NAN, 1.0, NAN, 1.0, 1.0], tmp_path, every_n_batches=every)
        assert len(module.seen) == reached  # before the batch that it was seen at, or at the end


@pytest.mark.parametrize("on_fault", ["stop", "skip"])
@pytest.mark.parametrize("broken", ["weight", "momentum"])
def test_a_broken_state_is_not_saved(tmp_path, on_fault, broken):
    """The losses so far are finite."""
    path = tmp_path / "last.ckpt"
    module = Slope({1: path, 2: path}, **{broken: 2})
    with pytest.raises(NumericalFault, match="step 2: trained weights or optimizer state are not finite"):
        fit(module, [1.0, 1.0, 1.0], tmp_path, on_fault=on_fault)
    assert load_checkpoint(path)["global_step"] == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"on_fault": "ignore"}, "'ignore': give stop or skip"),
        ({"window": 0}, "window 0: give a whole number of at least 1"),
        ({"grad_norm_factor": 1.0}, "grad_norm_factor 1.0: give a number above 1"),
        ({"grad_norm_factor": NAN}, "grad_norm_factor nan: give a number above 1"),
    ],
)
def test_invalid_values_are_refused(params, message):
    with pytest.raises(UserError, match=message):
        NumericalFaults(**params)


# A real run, one of whose samples makes its latent no number.


@pytest.fixture
def poisoned(train, tmp_path, monkeypatch):
    """Return `train` with NaN in sample 1003, and the list of sampled timesteps, one tensor per batch."""
    path = tmp_path / "shards/s-000001.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            if member.name == "1003.f8.npy":
                file = io.BytesIO()
                np.save(file, np.full((8, 4, 4), 6e4, np.float16))
                data = file.getvalue()
            tar.addfile(member, io.BytesIO(data))
    drawn = []
    encode, draw = LatentDiffusion.get_first_stage_encoding, LatentDiffusion.sample_timesteps

    def broken_encoding(self, encoded, *streams):
        latent = encode(self, encoded, *streams)
        return torch.where(latent.abs() > 1000, NAN, latent)

    def noted_timesteps(self, x, streams):
        drawn.append((draw(self, x, streams), x.flatten(1).isnan().any(1)))
        return drawn[-1][0]

    monkeypatch.setattr(LatentDiffusion, "get_first_stage_encoding", broken_encoding)
    monkeypatch.setattr(LatentDiffusion, "sample_timesteps", noted_timesteps)
    return train, drawn


def first_fault(drawn):
    """Return the step, counted from 1, and the timestep of the first sample that is NaN."""
    return next((step, int(t[bad])) for step, (t, bad) in enumerate(drawn, 1) if bad.any())


def checkpoint(logs):
    return load_checkpoint(the_run(logs) / "checkpoints/last.ckpt", mmap=False)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["", IN_BACKWARD])
def test_stop_names_step_timestep_and_sample_and_keeps_the_last_good_checkpoint(poisoned, tmp_path, optimizer):
    train, drawn = poisoned
    with pytest.raises(NumericalFault) as caught:
        train(f"-l logs --max_steps 7 lightning.modelcheckpoint.params.every_n_train_steps=1 {optimizer}")
    step, timestep = first_fault(drawn)
    assert 1 < step < 7 and len(drawn) == step
    assert str(caught.value).startswith(
        f"step {step}: loss nan, sample '1003' at timestep {timestep}; the step was not saved"
    )
    saved = checkpoint(tmp_path / "logs")
    assert saved["global_step"] == step - 1
    assert all(value.isfinite().all() for key, value in saved["state_dict"].items() if key.startswith("model"))


@pytest.mark.slow
def test_skip_continues_and_resumes_exactly(poisoned, tmp_path, caplog):
    train, drawn = poisoned
    skip = "lightning.callbacks.numerical_faults.params.on_fault=skip"
    assert train(f"-l whole --max_steps 8 {skip}") == 0
    step, timestep = first_fault(drawn)
    assert f"Skipped step {step}: loss nan, sample '1003' at timestep {timestep}" in caplog.text
    assert train(f"-l parts --max_steps {step} {skip}") == 0
    assert train(f"--resume {the_run(tmp_path / 'parts')} --max_steps 8") == 0
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert whole["global_step"] == parts["global_step"] == 8
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][key]), key
    steps = {int(state["step"]) for state in whole["optimizer_states"][0]["state"].values()}
    assert steps == {8 - sum(bool(bad.any()) for _, bad in drawn[:8])}  # Adam did not count what was left out


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [NAN, 100.0])
def test_a_faulty_step_of_a_scaled_loss_is_skipped(fused, bad, tmp_path):
    """A fused optimizer unscales gradients within its step, after the gradient scaler has checked them."""

    class Scaled(Slope):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.1, fused=fused)

    def left_out(values):
        scaling = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
        options = {"on_fault": "skip", "grad_norm_factor": 10.0, "window": 2}
        return fit(Scaled(), values, tmp_path, plugins=[scaling], **options)

    without, seen = left_out([1.0, 1.5, 0.5]), left_out([1.0, 1.5, bad, 0.5])
    assert seen == [*without[:2], without[1], without[2]]
