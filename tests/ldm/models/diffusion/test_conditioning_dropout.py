"""Captions that training replaces."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.conditioning_dropout import replaced, replacements_of
from ldm.util import UserError
from tests.ldm.models.diffusion.conftest import TEXT_TOWER, batch_of, construct

CPU = torch.device("cpu")


def test_ucg_training_replaces_a_share_of_captions() -> None:
    captions = [f"caption {number}" for number in range(2000)]
    batch = {"txt": captions, "other": captions}
    torch.manual_seed(0)
    changed = replaced(batch, replacements_of({"txt": {"p": 0.1, "val": "none"}}), CPU)
    assert changed["other"] is captions and batch["txt"] is captions
    assert changed["txt"].count("none") / 2000 == pytest.approx(0.1, abs=0.02)
    assert all(new in (old, "none") for new, old in zip(changed["txt"], captions, strict=True))


def test_replaced_labels_and_named_rows() -> None:
    """A tensor is replaced row by row; rows with names are the same in any batch."""
    rules = replacements_of({"label": {"p": 0.5, "val": 9}})
    names = [f"row {number}" for number in range(40)]
    whole = replaced({"label": torch.zeros(40, 1), "stream": names}, rules, CPU)["label"]
    halves = [
        replaced({"label": torch.zeros(20, 1), "stream": half}, rules, CPU)["label"]
        for half in (names[:20], names[20:])
    ]
    assert torch.equal(whole, torch.cat(halves)) and set(whole.flatten().tolist()) == {0, 9}


def test_ucg_training_in_a_step_and_not_in_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = construct(TEXT_TOWER, cond_stage_key="txt", ucg_training={"txt": {"p": 1.0, "val": None}})
    seen: list[list[str]] = []
    encode = model.get_learned_conditioning
    monkeypatch.setattr(model, "get_learned_conditioning", lambda captions: seen.append(captions) or encode(captions))
    monkeypatch.setattr(model, "log_dict", lambda *_, **__: None)
    batch = {"f8": batch_of((2, 8, 8, 8))["f8"], "txt": ["a cat", "a dog"]}
    model.training_step(batch, 0)
    model.eval()
    model.validation_step(batch, 0)
    assert seen[0] == ["", ""] and seen[1] == ["a cat", "a dog"]


@pytest.mark.parametrize("rule", [0.1, {"val": ""}, {"p": 1.5}, {"p": 0.1, "value": ""}])
def test_ucg_training_that_cannot_be(rule: object) -> None:
    with pytest.raises(UserError, match=r"ucg_training\.txt .*: give p, from 0 to 1"):
        replacements_of({"txt": rule})


def test_ucg_training_of_stored_encodings() -> None:
    with pytest.raises(UserError, match=r"ucg_training\.t5: .*null_cond_dropout"):
        replaced(batch_of((2, 8, 8, 8)), replacements_of({"t5": {"p": 1.0}}), CPU)
