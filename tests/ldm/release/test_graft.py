"""Released weights in a training checkpoint: every weight is the release's, everything else the training's."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from ldm.checkpoint import Pending, ema_key, load_checkpoint, save_checkpoint
from ldm.modules.ema import LitEma
from ldm.release.graft import graft, grafted_checkpoint
from ldm.release.initial_checkpoint import checkpoint_at_start, state_dict_without_weights
from ldm.release.keys import check_training_checkpoint
from ldm.util import UserError


def release(**changes):
    """A release of a tiny model, with a text tower and a noise schedule; None takes a key out."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "model.diffusion_model.out.0.weight": (3, 2),
        "model.diffusion_model.out.0.bias": (3,),
        "first_stage_model.conv.weight": (4,),
        "cond_stage_model.transformer.weight": (5,),
        "betas": (7,),
    }
    weights = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return {key: value for key, value in {**weights, **changes}.items() if value is not None}


def training(cond_stage=False, ema=False, dtype=torch.float32):
    """The state dict of a training of that model, full of zeros."""
    keys = [key for key in release() if cond_stage or not key.startswith("cond_stage_model.")]
    weights = {key: torch.zeros_like(release()[key], dtype=dtype) for key in keys}
    if ema:
        weights |= {ema_key(key): value.clone() for key, value in weights.items() if key.startswith("model.")}
        weights |= {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(9, dtype=torch.int)}
    return weights


def ema_of(weights, scale=10.0):
    """EMA keys for a release: its weights times `scale`."""
    averages = {ema_key(key): value * scale for key, value in weights.items() if key.startswith("model.")}
    return {
        **averages,
        "model_ema.decay": torch.tensor(0.5),
        "model_ema.num_updates": torch.tensor(1234, dtype=torch.int),
    }


def values(result):
    return {key: v.compute() if isinstance(v, Pending) else v for key, v in result.state_dict.items()}


def test_ema_keys_are_paths_without_dots():
    assert ema_key("model.diffusion_model.out.2.weight") == "model_ema.diffusion_modelout2weight"


def test_ema_keys_are_those_of_the_module():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    shadows = {f"model_ema.{key}" for key in LitEma(model).state_dict()} - {"model_ema.decay", "model_ema.num_updates"}
    assert {ema_key(f"model.{key}") for key in model.state_dict()} == shadows


def test_weights_are_the_releases_and_the_schedule_is_the_trainings():
    result = graft(training(), release(), "model.ckpt")
    weights = values(result)
    assert list(weights) == list(training())
    for key in weights:
        expected = training()[key] if key == "betas" else release()[key]
        assert torch.equal(weights[key], expected), key
    assert result.kept == ["betas"]
    assert result.skipped == ["cond_stage_model.transformer.weight"]
    assert "1 text encoder weights of the release skipped: this training has no text encoder" in "\n".join(
        result.summary()
    )


def test_a_cond_stage_that_is_trained_is_grafted_too():
    result = graft(training(cond_stage=True), release(), "model.ckpt")
    key = "cond_stage_model.transformer.weight"
    assert torch.equal(values(result)[key], release()[key])
    assert result.skipped == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_take_the_dtype_of_the_training(dtype):
    half = {key: value.half() for key, value in release().items()}
    for own, given in [(training(dtype=dtype), release()), (training(), half), (training(dtype=dtype), half)]:
        for key, value in values(graft(own, given, "model.ckpt")).items():
            assert value.dtype == own[key].dtype
            assert key == "betas" or torch.equal(value, given[key].to(own[key].dtype))


def test_the_average_starts_from_the_released_average():
    given = {**release(), **ema_of(release())}
    result = graft(training(ema=True), given, "model.ckpt")
    weights = values(result)
    for key in release():
        if key.startswith("model."):
            assert torch.equal(weights[ema_key(key)], given[ema_key(key)])
            assert torch.equal(weights[key], given[key])
    assert weights["model_ema.num_updates"] == 1234
    assert weights["model_ema.decay"] == training(ema=True)["model_ema.decay"]  # a setting of the training
    assert len(result.averaged) == 2


@pytest.mark.parametrize("partial", [False, True])
def test_without_a_whole_released_average_it_starts_from_the_weights(partial):
    given = release()
    if partial:
        given |= {"model_ema.diffusion_modelout0bias": torch.full((3,), 7.0)}
    weights = values(graft(training(ema=True), given, "model.ckpt"))
    for key in release():
        if key.startswith("model."):
            assert torch.equal(weights[ema_key(key)], release()[key])
    assert weights["model_ema.num_updates"] == 0


def test_updates_that_are_not_counted_stay_so():
    own = {**training(ema=True), "model_ema.num_updates": torch.tensor(-1, dtype=torch.int)}
    assert values(graft(own, release(), "model.ckpt"))["model_ema.num_updates"] == -1


def test_a_released_average_is_skipped_where_training_has_none():
    result = graft(training(), {**release(), **ema_of(release())}, "model.ckpt")
    assert sum(key.startswith("model_ema.") for key in result.skipped) == 4
    assert "4 EMA weights of the release skipped" in "\n".join(result.summary())


def test_optional_keys_of_a_release_may_come_or_lack():
    extra = {
        "first_stage_model.loss.logvar": torch.zeros(()),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "alphas_cumprod": torch.ones(7),
    }
    result = graft(training(), release(betas=None, **extra), "model.ckpt")
    assert list(result.state_dict) == list(training())


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        (training(), release(**{"model.diffusion_model.out.0.bias": None}), "lacks model.diffusion_model.out.0.bias"),
        (training(), release(**{"first_stage_model.conv.weight": None}), "lacks first_stage_model.conv.weight"),
        (training(), release(**{"first_stage_model.conv.weight": torch.ones(3)}), r"shape \(3,\).*\(4,\)"),
        (training(), release(**{"model.extra": torch.ones(3)}), "has model.extra, which the training lacks"),
        (
            training(True),
            release(**{"cond_stage_model.extra": torch.ones(3)}),
            "has cond_stage_model.extra, which the training lacks",
        ),
        (training(True), release(**{"cond_stage_model.transformer.weight": None}), "lacks cond_stage_model"),
    ],
)
def test_a_release_of_another_model_is_refused(own, given, message):
    with pytest.raises(UserError, match=message) as caught:
        graft(own, given, "model.ckpt")
    assert str(caught.value).startswith("model.ckpt: ")


def test_optimizers_forget_and_the_rest_stays():
    group = {"lr": 1e-3, "params": [0]}
    before = {
        "global_step": 12,
        "loops": {"fit_loop": {}},
        "state_dict": training(),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [group]}],
        "lr_schedulers": [{"last_epoch": 12}],
    }
    after = grafted_checkpoint(before, graft(before["state_dict"], release(), "model.ckpt"))
    assert after.pop("optimizer_states") == [{"state": {}, "param_groups": [group]}]
    assert after.pop("state_dict").keys() == before["state_dict"].keys()
    assert after == {key: before[key] for key in ("global_step", "loops", "lr_schedulers")}
    assert before["optimizer_states"][0]["state"]


def test_what_a_callback_kept_of_the_replaced_weights_is_forgotten():
    before = {
        "state_dict": training(),
        "optimizer_states": [],
        "callbacks": {"StepSeeds": {"seed": 3}, "Forgetting": {}},
    }
    after = grafted_checkpoint(before, graft(before["state_dict"], release(), "model.ckpt"))
    assert after["callbacks"] == {"StepSeeds": {"seed": 3}} and "Forgetting" in before["callbacks"]


class Tiny(pl.LightningModule):
    """A stand-in with the parts of a LatentDiffusion."""

    def __init__(self, width=3, ema=True):
        super().__init__()
        self.model = nn.Linear(2, width)
        self.first_stage_model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Embedding(3, 2))
        self.first_stage_model.requires_grad_(False)
        if ema:
            self.model_ema = LitEma(self.model)
        self.register_buffer("betas", torch.linspace(0, 1, 5))

    def training_step(self, batch, index):
        return self.model(batch[0]).square().sum()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def trainer(**settings):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", logger=False, **quiet, **settings)


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 2)), batch_size=2)


def test_a_model_is_described_without_its_weights():
    state_dict = state_dict_without_weights(Tiny)
    real = {key for key, value in state_dict.items() if not value.is_meta}
    assert real == {"model_ema.decay", "model_ema.num_updates", "betas"}
    assert torch.equal(state_dict["betas"], Tiny().betas)
    assert {key: value.shape for key, value in state_dict.items()} == {
        k: v.shape for k, v in Tiny().state_dict().items()
    }
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_fresh_checkpoint_starts_a_training_from_the_release(tmp_path):
    torch.manual_seed(0)
    given = {key: torch.randn_like(value) for key, value in Tiny(ema=False).state_dict().items()}
    grafted = graft(state_dict_without_weights(Tiny), given, "model.ckpt")
    save_checkpoint(checkpoint_at_start(grafted.state_dict), tmp_path / "last.ckpt")
    check_training_checkpoint(load_checkpoint(tmp_path / "last.ckpt"), "last.ckpt")

    model = Tiny()
    trainer(max_epochs=1).fit(model, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(model.betas, Tiny().betas)
    assert torch.equal(model.first_stage_model[0].weight, given["first_stage_model.0.weight"])
    assert torch.equal(model.model_ema.weight, given["model.weight"])
    moved = (model.model.weight - given["model.weight"]).abs().max()
    assert 0 < moved < 3e-3  # two steps of AdamW from the release, not from elsewhere
    assert model.trainer.global_step == 2


def test_a_grafted_training_goes_on_at_its_step(tmp_path):
    torch.manual_seed(0)
    first = trainer(max_epochs=1)
    first.fit(Tiny(), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    given = {key: torch.randn_like(value) for key, value in Tiny(ema=False).state_dict().items()}
    content = load_checkpoint(tmp_path / "last.ckpt")
    save_checkpoint(grafted_checkpoint(content, graft(content["state_dict"], given, "r")), tmp_path / "hacked.ckpt")

    model, second = Tiny(), trainer(max_epochs=2)
    second.fit(model, loader(), ckpt_path=tmp_path / "hacked.ckpt", weights_only=True)
    assert second.global_step == 4
    assert (model.model.weight - given["model.weight"]).abs().max() < 3e-3
    assert next(iter(second.optimizers[0].state.values()))["step"] == 2  # the moments began anew


@pytest.mark.parametrize(
    "content",
    [{}, {"state_dict": {}, "global_step": 0}, {**checkpoint_at_start({}), "optimizer_states": 3}],
)
def test_what_is_no_training_checkpoint_is_refused(content):
    with pytest.raises(UserError, match=r"^run\.ckpt: not a training checkpoint"):
        check_training_checkpoint(content, "run.ckpt")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_graft_refuses_numbers_of_another_kind(dtype):
    key = next(key for key in release() if key.startswith("model."))
    with pytest.raises(UserError, match=rf"r\.ckpt: {key} is {dtype}, but torch\.float32"):
        graft(training(), release(**{key: release()[key].to(dtype)}), "r.ckpt")


def test_graft_keeps_what_no_model_uses_of_a_training():
    extra = {"embedding_manager.x": torch.ones(2)}
    result = graft({**training(), **extra}, release(), "r.ckpt")
    assert torch.equal(result.state_dict["embedding_manager.x"], torch.ones(2))
