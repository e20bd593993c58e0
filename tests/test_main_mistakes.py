"""Tests that main.py answers each mistake with one clear line, and leaves no unfinished file."""

import resource

import pytest
import torch
from pytorch_lightning import Callback

from ldm.checkpoint import save_checkpoint, save_state_dict
from ldm.util import UserError
from tests.training_runs import (  # noqa: F401
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    state,
    the_run,
)

IMAGE_LOGGER = "lightning.callbacks.image_logger.params.disabled=False lightning.callbacks.image_logger.params"
VALIDATED = "data.params.val_urls=shards/s-000000.tar"


class FailAfter(Callback):
    """Callback that raises an error in a training step, like a damaged file."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise UserError("unreadable")


class FullDisk(Callback):
    """Callback that limits files to 100 kB from one step to another, like a full disk."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        is_full = self.first <= trainer.global_step + 1 <= self.last
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if is_full else self.limits[0], self.limits[1]))

    def on_fit_end(self, trainer, pl_module) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    def on_exception(self, trainer, pl_module, exception) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--max_step 3", "unknown option --max_step; did you mean 'max_steps'"),
        ("lightning.trainer.max_step=3", "unknown key lightning.trainer.max_step; did you mean 'max_steps'"),
        ("lightning.callback.x=3", "unknown key lightning.callback; did you mean 'callbacks'"),
        ("--precision 13", r"lightning.trainer: Precision 13 is invalid.*\(given: .*precision=13\)"),
        ("--accelerator gpu", "lightning.trainer: .*"),
        ("--accelerator tpu", "lightning.trainer: .*torch_xla"),
        ("model.params.use_emma=True", "unknown key 'use_emma'.*; did you mean 'use_ema'"),
        ("data.params.batchsize=3", "unknown key 'batchsize' in params of main.WebDataNpyModuleFromConfig"),
        (
            "lightning.callbacks.image_logger.params.max_image=1",
            "lightning.callbacks.image_logger: unknown key 'max_image' .*; did you mean 'max_images'",
        ),
        (f"{IMAGE_LOGGER}.batch_frequency=0", "image_logger: batch_frequency 0: give a whole number of at least 1"),
        (f"{IMAGE_LOGGER}.max_images=-1", "image_logger: max_images -1: give a whole number of at least 1"),
        (
            f"{IMAGE_LOGGER}.log_images_kwargs.ddim_stepz=5",
            "unknown key 'ddim_stepz' in params of the image logger's log_images_kwargs; did you mean 'ddim_steps'",
        ),
        (
            f"{IMAGE_LOGGER}.log_images_kwargs.ddim_steps=few",
            "ddim_steps='few' in params .*: give a whole number",
        ),
        (
            f"{IMAGE_LOGGER}.log_images_kwargs.n_row=0",
            "the image logger's log_images_kwargs: n_row 0: give a whole number of at least 1",
        ),
        (f"{IMAGE_LOGGER}.log_images_kwargs.N=0", "log_images_kwargs: N 0: give a whole number of at least 1"),
        ("lightning.callbacks.mine.params.x=1", "lightning.callbacks.mine: expected a mapping with the key 'target'"),
        ("lightning.modelcheckpoint.save_top_k=1", "unknown key lightning.modelcheckpoint.save_top_k"),
        (
            "lightning.modelcheckpoint.params.train_time_interval=soon",
            "train_time_interval 'soon': give a number of min",
        ),
        ("--accumulate_grad_batches 0", "accumulate_grad_batches 0: give a whole number of at least 1"),
        ("model.params.unet_config.params.model_channels=-32", "UNetModel: .*negative dimension"),
        ("model.base_learning_rate=-1", "model.base_learning_rate -1: give a number"),
        ("data.params=[]", "'data.params=\\[\\]': replaces a mapping by a list"),
        ("--strategy fsdp --devices 2", "strategy fsdp cannot shard the EMA; set model.params.use_ema=False"),
        ("--strategy fsdp_cpu_offload --devices 2", "writes checkpoints of another format; give --strategy fsdp"),
        ("lightning.modelcheckpoint.params.save_topk=1", "unknown key 'save_topk' .*; did you mean 'save_top_k'"),
        ("model.params.ckpt_path=None", "ckpt_path 'None': name a checkpoint, or write null for none"),
        ("model.params.cond_stage_config=null", "cond_stage_config: expected a mapping with the key 'target'"),
        ("model.params.scheduler_config.target=torch.optim.lr_scheduler.StepLR", "step_size"),
        ("data.params.batch_size=abc", "batch_size='abc' in params of main.WebDataNpy.*: give a whole number"),
        ("data.params.batch_size=2.5", "batch_size=2.5 in params of .*: give a whole number"),
        ("data.params.batch_size=null", "batch_size=None in params of .*: give a whole number"),
        ("model.params.timesteps=abc", "timesteps='abc' in params of .*: give a whole number"),
        ("model.params.scale_factor=0,18215", "scale_factor='0,18215' in params of .*LatentDiffusion: give a number"),
        ("data.params.null_cond_dropout=a", "null_cond_dropout='a' in params of main.WebDataNpy.*: give a number"),
        (
            "lightning.callbacks.numerical_faults.params.grad_norm_factor=a",
            "lightning.callbacks.numerical_faults: grad_norm_factor='a' in params of .*: give a number or null",
        ),
        ("model.params.use_ema='\"False\"'", "use_ema=.*False.* in params of .*LatentDiffusion: give true or false"),
        ("model.params.use_ema=maybe", "use_ema='maybe' in params of .*LatentDiffusion: give true or false"),
        ("model.params.unet_config.params.model_channels=33", "33.* must be (divisible by|a multiple of)"),
        ("data.params.num-workers=2", "unknown key 'num-workers' .*; did you mean 'num_workers'"),
        (
            "--init_word toy --data_root images",
            "--data_root and --init_word: not an option here; for textual inversion .*textual_inversion.yaml",
        ),
        ("--finetune_from nothing.ckpt", "nothing.ckpt"),
        ("model.base_learning_rate=null", "model.base_learning_rate None: give a number"),
        ("lightning.scale_lr=maybe", "lightning.scale_lr 'maybe': give true or false"),
        (
            "--gradient_clip_val 1.0 --gradient_clip_algorithm nope",
            "gradient_clip_algorithm 'nope': give norm or value",
        ),
        ("--limit_train_batches 5.5", "lightning.*limit_train_batches.*"),
        (
            f"{VALIDATED} --val_check_interval 100 --check_val_every_n_epoch 1",
            "val_check_interval: longer than an epoch .*check_val_every_n",
        ),
        ("--max_time 5", "lightning.trainer.max_time 5: give a time as DD:HH:MM:SS"),
        ("lightning.modelcheckpoint.params.save_last=2.5", "modelcheckpoint.params.save_last 2.5: give true"),
        (
            "lightning.modelcheckpoint.params.every_n_epochs=often",
            "every_n_epochs='often' in params of .*: give a whole",
        ),
        (
            "lightning.modelcheckpoint.params.save_on_train_epoch_end=3",
            "save_on_train_epoch_end=3 in params of .*: give true or false or null",
        ),
        ("--gpus .inf", "lightning.trainer.gpus inf: give device numbers"),
        (
            "--val_percent_check 0.5 --limit_val_batches 2",
            "--val_percent_check and --limit_val_batches are two names of one argument",
        ),
        ("lightning.modelcheckpoint.params.mode=.nan", "mode=nan in params of .*: give a text"),
        (
            "lightning.callbacks.early.target=pytorch_lightning.callbacks.EarlyStopping "
            "lightning.callbacks.early.params.monitor=train/loss lightning.callbacks.early.params.min_delta=.nan",
            "lightning.callbacks.early: min_delta=nan in params of .*: is not a number",
        ),
        ("--accelerator tpu", "lightning.trainer: Requirement 'torch_xla.*accelerator='tpu'"),
        ("--callbacks mine", "lightning.trainer.callbacks 'mine': describe each under lightning.callbacks"),
        ("--default_root_dir here", "default_root_dir 'here': run folders are made in --logdir"),
        ("-b nothing.yaml", "config 'nothing.yaml' not found"),
        ("data.params.training_urls=nowhere.tar", "nowhere.tar"),
        ("model.params.unet_config.params.context_dim=16", r"t5 has shape \(77, 8\), but the UNet's context_dim is 16"),
    ],
)
def test_mistakes_are_refused_in_one_line_and_write_nothing(train, tmp_path, line, message):
    with pytest.raises(UserError, match=message) as caught:
        train(f"--max_steps 1 {line}")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("logs/*"))


def test_a_logger_whose_package_is_missing_is_refused_in_one_line(train, monkeypatch):
    monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(UserError, match=r"lightning.logger: .*WandbLogger needs a package that is not installed"):
        train("--max_steps 1 lightning.logger.target=pytorch_lightning.loggers.WandbLogger")


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (2, ""),
        (6, "lightning.modelcheckpoint.params.every_n_train_steps=4"),  # before the second epoch's first step
        (7, f"{VALIDATED} --check_val_every_n_epoch 1 lightning.modelcheckpoint.params.every_n_train_steps=100"),
        (4, f"--accumulate_grad_batches 2 {VALIDATED} --val_check_interval 2"),
    ],
)
def test_a_mistake_found_while_training_loses_nothing(train, tmp_path, step, options):
    fail = "lightning.callbacks.fail"
    with pytest.raises(UserError, match="unreadable"):
        mistake = f"{fail}.target=tests.test_main_mistakes.FailAfter {fail}.params.step={step}"
        train(f"-l failed --max_steps 9 {options} {mistake}")
    failed = the_run(tmp_path / "failed")
    assert sorted(logged(failed, "train/loss")) == list(range(step))
    train(f"-l straight --max_steps 9 {options}")
    with pytest.raises(UserError, match=r"tests\.test_main_mistakes\.FailAfter.*--trust-config"):
        train(f"--resume {failed} {fail}.params.step=-1")  # what was typed then is now what a file says
    assert train(f"--resume {failed} --trust-config {fail}.params.step=-1") == 0
    assert_same_training(the_run(tmp_path / "straight"), failed)


# Training waits for each checkpoint, so that the disk is full for those of the steps that are meant.
EVERY_SECOND = " ".join(
    f"lightning.modelcheckpoint.params.{setting}" for setting in ("every_n_train_steps=2", "in_background=false")
)


def full_from(first, last):
    """Return the overrides with which the disk is full for checkpoints from one step to another."""
    full = "lightning.callbacks.full"
    return f"{full}.target=tests.test_main_mistakes.FullDisk {full}.params.first={first} {full}.params.last={last}"


def test_a_disk_that_is_full_for_a_while_costs_nothing(train, tmp_path, caplog):
    every = f"{EVERY_SECOND} lightning.modelcheckpoint.params.save_top_k=1"
    options = f"--max_steps 7 {every} data.params.val_urls=shards/s-000000.tar --val_check_interval 2"
    train(f"-l straight {options}")
    assert train(f"-l full {options} {full_from(3, 6)}") == 0
    full = the_run(tmp_path / "full")
    assert "No checkpoint at step 4: " in caplog.text and "last.ckpt: File too large; training continues" in caplog.text
    assert_same_training(the_run(tmp_path / "straight"), full)
    kept = state(full / "checkpoints" / "last.ckpt")["callbacks"]
    (best,) = (values["best_k_models"] for name, values in kept.items() if name.startswith("KeptCheckpoints"))
    on_disk = {str(path) for path in (full / "checkpoints").glob("epoch*.ckpt")}
    assert set(best) == on_disk, "what could not be written is not remembered, and nothing was removed for it"
    assert not list((full / "checkpoints").glob(".*"))


def test_a_disk_that_is_full_at_the_end_is_an_error_and_the_last_checkpoint_intact(train, tmp_path):
    with pytest.raises(OSError, match="File too large"):
        train(f"--max_steps 5 {EVERY_SECOND} {full_from(3, 9)}")
    run = the_run(tmp_path / "logs")
    assert state(run / "checkpoints" / "last.ckpt")["global_step"] == 2
    train(f"-l straight --max_steps 5 {EVERY_SECOND}")
    full = "lightning.callbacks.full.params"
    assert train(f"--resume {run} --trust-config {full}.first=9") == 0
    assert_same_training(the_run(tmp_path / "straight"), run)


def test_debug_opens_the_debugger_on_an_error(train, monkeypatch):
    opened = []
    monkeypatch.setattr("pdb.post_mortem", lambda: opened.append(True))
    with pytest.raises(UserError):
        train("-d --max_steps 1 data.params.training_urls=nowhere.tar")
    assert opened == [True]


def test_an_optimizer_that_does_not_fit_is_refused_in_one_line(train, tmp_path):
    train("--max_steps 1")
    run = the_run(tmp_path / "logs")
    with pytest.raises(UserError, match="optimizer state of the checkpoint does not fit this config"):
        train(f"--resume {run} --max_steps 2 model.params.learn_logvar=True")
    assert train(f"--resume {run} --max_steps 2") == 0  # what failed left no trace


def test_checkpoints_that_cannot_be_resumed_are_refused_in_one_line(train, tmp_path):
    train("-l other --max_steps 1 model.params.unet_config.params.model_channels=64")
    (the_run(tmp_path / "other") / "checkpoints" / "last.ckpt").rename(tmp_path / "other.ckpt")
    save_state_dict({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    save_checkpoint({"state_dict": {"a": torch.zeros(1)}, "callbacks": {}}, tmp_path / "weights.ckpt")
    (tmp_path / "broken.ckpt").write_bytes((tmp_path / "other.ckpt").read_bytes()[:9000])
    for name, message in {
        "other.ckpt": r"model\.diffusion_model\..* has shape .* is this a checkpoint of another model",
        "weights.safetensors": "not a training checkpoint .*hack_weights",
        "weights.ckpt": r"not a training checkpoint \(it lacks global_step, optimizer_states, lr_schedulers\)",
        "broken.ckpt": "damaged",
        "missing.ckpt": "no such run folder or checkpoint",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            train(f"-b tiny.yaml --resume {name} --max_steps 1")
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "logs").exists()


def test_a_damaged_last_checkpoint_names_the_newest_undamaged_one(train, tmp_path):
    where = "lightning.modelcheckpoint.params"
    train(f"-l straight --max_steps 5 {where}.every_n_train_steps=1")
    train(f"--max_steps 3 {where}.every_n_train_steps=1 {where}.monitor=null {where}.save_top_k=-1")
    run = the_run(tmp_path / "logs")
    first, second, third = sorted((run / "checkpoints").glob("epoch*.ckpt"))
    last = run / "checkpoints" / "last.ckpt"
    (last.parent / ".last.999999999.tmp.ckpt").write_bytes(second.read_bytes())  # what a kill left is nobody's
    whole = last.read_bytes()
    moment = state(last)["optimizer_states"][0]["state"][0]["exp_avg"].numpy().tobytes()
    flipped = whole.replace(moment, bytes([moment[0] ^ 1]) + moment[1:])
    for damage in (b"", whole[:-9000], flipped):
        last.write_bytes(damage)
        third.write_bytes(damage)
        with pytest.raises(UserError) as caught:
            train(f"--resume {run} --max_steps 5")
        message = str(caught.value)
        assert message.endswith(f"undamaged one of this run, of step 2: python main.py --resume {second} -t")
        assert message.startswith(f"{last}: ") and "\n" not in message
    assert train(f"--resume {second} --max_steps 5") == 0
    assert_same_training(the_run(tmp_path / "straight"), run)
    for path in (first, second, third, last, *last.parent.glob("epoch*.ckpt")):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"last.ckpt: empty file; .*; this run has no other undamaged checkpoint"):
        train(f"--resume {run} --max_steps 5")


def test_a_mistake_on_the_command_line_exits_with_one_line(command):
    result = command("main.py", "-b", "nothing.yaml", "-t")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: config 'nothing.yaml' not found")
