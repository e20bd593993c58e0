"""Tests of the command line of main.py, with the forms of 2022 and of today."""

from pathlib import Path

import pytest

from ldm.training.arguments import parse_arguments
from ldm.util import UserError

ROOT = Path(__file__).resolve().parents[3]

TUTORIALS = [
    (
        "--base configs/latent-diffusion/a.yaml -t --gpus 0,",
        {"base": ["configs/latent-diffusion/a.yaml"], "train": True, "trainer": {"gpus": "0,"}},
    ),
    (
        "-t True --base a.yaml b.yaml --gpus 0,1 --scale_lr False --no-test",
        {"base": ["a.yaml", "b.yaml"], "trainer": {"gpus": "0,1"}, "scale_lr": False, "no_test": True},
    ),
    (
        "--train --base a.yaml --gpus=1 --precision 16 --accelerator ddp --num_nodes 1 --benchmark",
        {
            "train": True,
            "trainer": {"gpus": 1, "precision": 16, "accelerator": "ddp", "num_nodes": 1, "benchmark": True},
        },
    ),
    (
        "-b a.yaml -b b.yaml -n run -f _x -l /data/logs -s 7 -p proj -d true",
        {"base": ["a.yaml", "b.yaml"], "name": "run", "postfix": "_x", "logdir": Path("/data/logs"), "seed": 7}
        | {"project": "proj", "debug": True},
    ),
    (
        "--resume logs/run -t --max_steps -1 --max_epochs 3 --weights_summary None --max_time 12:00:00",
        {"resume": "logs/run"}
        | {"trainer": {"max_steps": -1, "max_epochs": 3, "weights_summary": None, "max_time": "12:00:00"}},
    ),
    (
        "--base a.yaml model.params.use_ema=True -t data.params.batch_size=2 --limit_val_batches 0.5",
        {"base": ["a.yaml"], "overrides": ["model.params.use_ema=True", "data.params.batch_size=2"]},
    ),
    (
        "--base a.yaml --model.base_learning_rate 1e-4 --benchmark data.params.batch_size=2 --max-steps 3",
        {"overrides": ["model.base_learning_rate=1e-4", "data.params.batch_size=2"]}
        | {"trainer": {"benchmark": True, "max_steps": 3}},
    ),
    ("--base a.yaml --resume_from_checkpoint m.ckpt -t", {"resume": "m.ckpt", "trainer": {}}),
    ("--base a.yaml --resume_from_checkpoint None -t", {"resume": None, "trainer": {}}),
    ("--resume logs/run --resume_from_checkpoint None -t", {"resume": "logs/run", "trainer": {}}),
    ("--resume m.ckpt --resume_from_checkpoint m.ckpt -t", {"resume": "m.ckpt", "trainer": {}}),
    (
        "--base a.yaml -t --actual_resume sd-v1-4.ckpt",
        {"resume": None, "overrides": ["model.params.ckpt_path=sd-v1-4.ckpt"]},
    ),
]


@pytest.mark.parametrize(("line", "expected"), TUTORIALS)
def test_command_lines_of_2022(line, expected):
    arguments = parse_arguments(line.split())
    assert {key: getattr(arguments, key) for key in expected} == expected


def test_defaults():
    arguments = parse_arguments(["-b", "a.yaml"])
    assert not arguments.train and not arguments.no_test
    assert (arguments.seed, arguments.scale_lr, arguments.logdir) == (None, None, Path("logs"))
    assert (arguments.postfix, arguments.trainer) == ("", {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-t --gpus 0,", "nothing to do: give a config with --base"),
        ("-b a.yaml --no-test", "nothing to do: --no-test without --train"),
        (
            "--resume logs/run --resume_from_checkpoint m.ckpt -t",
            "--resume logs/run and --resume_from_checkpoint m.ckpt differ; give one of them",
        ),
        ("-b a.yaml -t maybe", "expected True or False, got 'maybe'"),
        ("-b a.yaml -s x", "--seed: expected a whole number from 0 to 4294967295, got 'x'"),
        ("-b a.yaml -s -1", "--seed: expected"),
        ("-b a.yaml -z", "unrecognized arguments: -z"),
        ("-b a.yaml --devices [0", r"--devices: '\[0': the value is not valid YAML"),
    ],
)
def test_misuse_is_refused_in_one_line(line, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_arguments(line.split())
    assert "\n" not in str(caught.value)


def test_help_imports_neither_torch_nor_lightning(help_of):
    printed, packages = help_of(ROOT / "main.py")
    assert "ldm" in packages
    assert not packages & {"torch", "pytorch_lightning", "lightning", "omegaconf", "numpy"}
    assert "--scale_lr" in printed and "argument of Lightning's Trainer" in printed
