"""Prompts of `make_prior.py --keep`, from tables by hand and from the shipped ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.encoding.keep_prompts import keep_prompts, neighbours_of
from ldm.text_files import read_lines
from ldm.util import UserError
from tests.conftest import ROOT

SHIPPED = ROOT / "data/prompts/neighbours.txt", ROOT / "data/prompts/general.txt"


@pytest.fixture
def lists(tmp_path: Path) -> tuple[Path, Path]:
    table, general = tmp_path / "neighbours.txt", tmp_path / "general.txt"
    table.write_text("# a comment, with a comma\ncat, owl\nowl, eagle , cat\ndog, cat, ant\n")
    general.write_text("".join(f"scene {number}\n" for number in range(10)))
    return table, general


def test_the_prompts_by_hand(lists: tuple[Path, Path]) -> None:
    found = keep_prompts(["cat"], *lists, 3)
    assert found == [
        *("a photo of a cat", "a drawing of a cat", "a photo of an owl", "a drawing of an owl"),
        *("scene 0", "scene 3", "scene 6"),
    ]
    assert keep_prompts(["cat", "owl"], *lists, 0)[-2:] == ["a photo of an eagle", "a drawing of an eagle"]


def test_capitals_and_spaces_of_a_class_do_not_matter(lists: tuple[Path, Path]) -> None:
    assert keep_prompts(["  CAT "], *lists, 1) == keep_prompts(["cat"], *lists, 1)
    assert keep_prompts(["Red  Panda"], *SHIPPED, 0)[0] == "a photo of a red panda"


def test_a_class_takes_the_groups_that_it_begins(lists: tuple[Path, Path]) -> None:
    assert neighbours_of("owl", lists[0]) == ["eagle", "cat"]
    assert neighbours_of("ant", lists[0]) == ["dog", "cat"]


@pytest.mark.parametrize(
    ("subject", "count", "message"),
    [
        (
            "catt",
            1,
            "--keep 'catt': .*neighbours.txt has no such class; take 'cat', and give prompts of your own class",
        ),
        ("Cats", 1, "--keep 'cats': .*take 'cat', and give"),
        ("xyz", 1, "--keep 'xyz': .*take the most similar of its 5, and give"),
        ("", 1, "--keep '': .*take the most similar of its 5"),
        ("cat", 11, "--general 11: give a whole number of at most 10|--general 11"),
    ],
)
def test_bad_values_are_refused(lists: tuple[Path, Path], subject: str, count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        keep_prompts([subject], *lists, count)


def test_every_shipped_class_has_neighbours() -> None:
    groups = [line.split(", ") for _, line in read_lines(SHIPPED[0]) if not line.startswith("#")]
    assert all(len(group) == len(set(group)) >= 6 for group in groups)
    assert len(keep_prompts([name for group in groups for name in group], *SHIPPED, 150)) > 400
