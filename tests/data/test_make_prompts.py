"""Tests of the shipped general prompts and of the script that writes them."""

from __future__ import annotations

import re
import runpy
from collections import Counter

from tests.conftest import ROOT

SCRIPT, SHIPPED = ROOT / "data/make_prompts.py", ROOT / "data/prompts/general.txt"


def test_the_script_writes_the_shipped_file() -> None:
    assert SHIPPED.read_text(encoding="utf-8").splitlines() == runpy.run_path(str(SCRIPT))["captions"]()


def test_the_prompts_are_varied_and_well_formed() -> None:
    script, lines = runpy.run_path(str(SCRIPT)), SHIPPED.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 2000
    subjects = [subject for text, _ in script["KINDS"].values() for subject in script["listed"](text)]
    assert len(subjects) > 250 and len(subjects) == len(set(subjects))
    counts = Counter({subject: sum(subject in line for line in lines) for subject in subjects})
    assert min(counts.values()) >= 3
    assert not [line for line in lines if re.search(r"\ba [aeio]|\ban [^aeiouh]|  | ,|\{|\ba a", line)]
    assert max(len(line.split()) for line in lines) < 25  # CLIP takes 75 tokens
