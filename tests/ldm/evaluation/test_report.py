"""Tests of the table, the JSON file and the figure."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.evaluation.denoising import Comparison
from ldm.evaluation.plots import write_figure
from ldm.evaluation.releases import SetResult
from ldm.evaluation.report import FORMAT_VERSION, format_table, summarise_results, write_json
from ldm.evaluation.samples import SampleDistances, Samples
from ldm.evaluation.sets import open_set
from ldm.models.diffusion.text_to_image import Request

FIGURES = ["loss_base", "loss_tuned", "loss_difference", "loss_ratio", "drift"]


@pytest.fixture
def results(shard, model):
    """Return results at two timesteps of a set of five images with samples, and of a set of one image without."""
    base = np.array([[0.1, 0.2]] * 5)
    base[0] += 0.1
    request = [
        Request("an image of a", 3),
        Request("an image of c, with a description that is far too long for two lines", 4),
    ]
    black, white = -torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    return [
        SetResult(
            open_set("new", str(shard), model),
            [12, 37],
            Comparison(base, base * 0.5, np.full((5, 2), 0.04)),
            Samples(["a", "c"], request, black),
            Samples(["a", "c"], request, white),
            SampleDistances([1.0, 1.0], [0.5, 0.25], [0.25, 0.25]),
        ),
        SetResult(open_set("rest", str(shard), model, 1), [12, 37], Comparison(base[:1], base[:1], 0 * base[:1])),
    ]


def test_the_table_is_one_line_per_set(results):
    head, new, rest = format_table(summarise_results(results[:1] + results[:1])).splitlines()
    assert len(head) == len(new) == len(rest)
    assert head.split("  ")[0] == "set" and head.endswith("tuned to image")
    assert " ".join(new.split()) == "new 5 0.17000 0.08500 0.5 [0.5, 0.5] 0.04 [0.04, 0.04] 1.0000 0.3750 0.2500"
    alone = format_table(summarise_results(results[1:])).splitlines()[1]
    assert " ".join(alone.split()) == "rest 1 0.25000 0.25000 1 0"


def test_the_json_file_holds_everything(results, tmp_path):
    write_json(
        summarise_results(results),
        {"base": "b.ckpt", "settings": {"limit": None}},
        tmp_path / "new" / "evaluation.json",
    )
    content = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert list(content) == ["format_version", "base", "settings", "intervals", "sets"]
    assert content["format_version"] == FORMAT_VERSION == 2
    assert content["intervals"]["confidence"] == 0.95 and content["intervals"]["resamples"] == 2000
    new, rest = content["sets"]["new"], content["sets"]["rest"]
    for entry in (new, rest):
        assert list(entry) == ["shards", "images", "keys", "overall", "timesteps", "samples"]
        assert list(entry["overall"]) == FIGURES
        assert [list(at) for at in entry["timesteps"]] == [["t", *FIGURES]] * 2
        assert [at["t"] for at in entry["timesteps"]] == [12, 37]
        assert all(list(entry["overall"][name]) == ["value", "low", "high"] for name in FIGURES)
    assert new["images"] == 5 and new["keys"] == ["a", "b", "c", "d", "e"] and new["shards"][0].endswith("five.tar")
    assert new["timesteps"][0]["loss_base"]["value"] == pytest.approx(0.12)
    assert new["overall"]["loss_ratio"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert new["samples"]["base_to_tuned"]["value"] == 1.0
    assert new["samples"]["images"][1] == {
        "key": "c",
        "prompt": "an image of c, with a description that is far too long for two lines",
        "seed": 4,
        "base_to_tuned": 1.0,
        "base_to_image": 0.25,
        "tuned_to_image": 0.25,
    }
    assert rest["samples"] is None and rest["overall"]["drift"] == {"value": 0.0, "low": None, "high": None}


def test_write_figure_shows_bars_lines_and_samples(results, tmp_path):
    write_figure(summarise_results(results), "tuned beside base", tmp_path / "all.png")
    write_figure(summarise_results(results[1:]), "tuned beside base", tmp_path / "plain.png")
    with Image.open(tmp_path / "all.png") as whole, Image.open(tmp_path / "plain.png") as plain:
        assert whole.width == plain.width and whole.height > plain.height + 96
        colours = {colour for _, colour in whole.convert("RGB").getcolors(1 << 20)}
        assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0)} <= colours, "the colours of the two sets"
        below = np.asarray(whole.convert("RGB"))[plain.height :]
        assert (below == 0).all(-1).sum() >= 2 * 64 * 64, "two samples of the base"


def test_write_figure_takes_any_title(results, tmp_path):
    write_figure(summarise_results(results), "a_$x^{2$ beside 漢字", tmp_path / "named.png")
    with Image.open(tmp_path / "named.png") as image:
        image.verify()
