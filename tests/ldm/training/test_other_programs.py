"""Options of other training programs: each is told what takes its place here."""

from __future__ import annotations

import inspect

import pytest
from pytorch_lightning import Trainer

from ldm.training.other_programs import _INSTEAD, instead_of
from ldm.training.trainer_2022 import check_names
from ldm.util import UserError


@pytest.mark.parametrize(
    ("option", "use"),
    [
        ("pretrained_model_name_or_path", "--finetune_from"),
        ("instance_data_dir", "tools/preencode.py"),
        ("class_data_dir", "tools/make_prior.py"),
        ("train_batch_size", "data.params.batch_size"),
        ("max_train_steps", "--max_steps"),
        ("gradient_accumulation_steps", "--accumulate_grad_batches"),
        ("learning_rate", "model.base_learning_rate"),
        ("network_module", "tools/extract_lora.py"),
        ("config_file", "--base"),
        ("mixed_precision", "--precision"),
        ("output_dir", "--logdir"),
        ("sample_prompts", "--previews FILE"),
        ("shuffle_caption", "--tag-variants"),
        ("dataset_repeats", "data.params.training_urls"),
    ],
)
def test_instead_of_names_what_to_give(option: str, use: str) -> None:
    with pytest.raises(UserError, match=rf"unknown option --{option}; .*{use}") as caught:
        check_names([option], {"max_steps", "precision"}, "option --{}")
    assert "\n" not in str(caught.value)


def test_instead_of_names_no_argument_of_lightning() -> None:
    assert not _INSTEAD.keys() & {*inspect.signature(Trainer).parameters}
    assert list(_INSTEAD) == sorted(_INSTEAD)
    assert instead_of("max_steps") == ""
