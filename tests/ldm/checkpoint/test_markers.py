"""Markers of the prediction in a file are read, compared with the config, and written."""

from __future__ import annotations

import pytest
import torch

from ldm.checkpoint.keys import EDM_MARKERS, V_PREDICTION, ZERO_SNR
from ldm.checkpoint.markers import (
    PREDICTION_TYPE,
    check_markers,
    compare_markers,
    marked_parameterization,
    with_markers,
)
from ldm.util import UserError


def test_marked_parameterization_is_v_or_unknown() -> None:
    assert marked_parameterization([V_PREDICTION, "model.w"]) == "v"
    assert marked_parameterization([ZERO_SNR, "model.w"]) is None


@pytest.mark.parametrize("marker", EDM_MARKERS)
def test_check_markers_refuses_another_noise_schedule(marker: str) -> None:
    check_markers([V_PREDICTION, ZERO_SNR], "a.ckpt")
    with pytest.raises(UserError, match=f"a.ckpt: holds {marker}, the marker of an EDM noise schedule"):
        check_markers([marker], "a.ckpt")
    with pytest.raises(UserError, match="EDM"):
        compare_markers([marker], "v", "a.ckpt")


def test_compare_markers_warns_of_another_prediction(caplog: pytest.LogCaptureFixture) -> None:
    compare_markers([V_PREDICTION], "v", "a.ckpt")
    compare_markers([], "eps", "a.ckpt")
    assert not caplog.records
    compare_markers([V_PREDICTION], "eps", "a.ckpt")
    assert "a.ckpt: holds v_pred, the marker of v-prediction" in caplog.text
    compare_markers([], "v", "a.ckpt", {PREDICTION_TYPE: "epsilon"})
    assert "a.ckpt: its modelspec.prediction_type is epsilon, but the config's parameterization is v" in caplog.text


def test_marked_parameterization_follows_the_metadata_after_the_marker() -> None:
    assert marked_parameterization([], {PREDICTION_TYPE: "epsilon"}) == "eps"
    assert marked_parameterization([], {PREDICTION_TYPE: "v"}) == "v"
    assert marked_parameterization([V_PREDICTION], {PREDICTION_TYPE: "epsilon"}) == "v"
    assert marked_parameterization([], {PREDICTION_TYPE: "flow"}) is None


@pytest.mark.parametrize(
    ("prediction", "zero_snr", "expected"),
    [
        ("eps", False, set()),
        ("eps", True, set()),
        ("v", False, {V_PREDICTION}),
        ("v", True, {V_PREDICTION, ZERO_SNR}),
    ],
)
def test_with_markers_has_those_of_the_prediction_alone(prediction: str, zero_snr: bool, expected: set) -> None:
    weights = {"model.w": torch.ones(2)}
    for start in (weights, {**weights, V_PREDICTION: torch.zeros(0), ZERO_SNR: torch.zeros(0)}):
        marked = with_markers(start, prediction, zero_snr)
        assert marked.keys() == weights.keys() | expected
        assert all(marked[key] is start[key] for key in marked.keys() & start.keys())
