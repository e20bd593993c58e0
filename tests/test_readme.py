"""Test of the table of families in the README."""

from __future__ import annotations

import re

from ldm.release.families import FAMILIES
from tests.conftest import ROOT


def test_the_readme_names_every_family_and_its_config() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (Stable Diffusion [^|]+|InstructPix2Pix) \| `([^`]+)`", page, re.MULTILINE))
    assert rows == {family.name: family.finetune_config for family in FAMILIES.values()}
