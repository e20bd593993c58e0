"""Tests of the table of a plan."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from ldm.studio.plan_table import TierRow, advice, measured_speeds, tier_rows, tiers_html

GIB = 2**30
FOUND = {
    "tiers": [
        {"tier": "as given", "images": 0, "peak": 13 * GIB, "host": GIB, "parts": {"weights": 9 * GIB}},
        {"tier": "lean.yaml", "images": 4, "peak": 4 * GIB, "host": 2 * GIB, "parts": {"weights": GIB}},
    ],
    "use": "lean.yaml",
}


def test_tiers_html_has_the_memory_by_part_and_marks_the_choice() -> None:
    rows = tier_rows(FOUND, {"lean.yaml": 2.5})
    assert rows[1] == TierRow("lean.yaml", 4, 4.0, 2.0, {"weights": 1.0}, 2.5)
    text = tiers_html(rows, FOUND["use"])
    assert '<tr><th scope="row">as given</th><td>does not fit</td><td class="number">13.00</td>' in text
    assert '<tr class="studio-good"><th scope="row">lean.yaml</th><td class="number">4</td>' in text
    assert text.count("–") == 1


def test_advice() -> None:
    rows = tier_rows(FOUND, {"lean.yaml": 2.5})
    assert "the tier lean.yaml, with up to 4 images" in advice(rows, "lean.yaml", 0)
    assert "In 10 minutes it sees about 1,500 images" in advice(rows, "lean.yaml", 10)
    assert "ends after 10 minutes" in advice(tier_rows(FOUND, {}), "lean.yaml", 10)
    assert advice(rows, None, 0).startswith("Nothing fits")


def write_run(folder: Path, configs: list[str], images: int, seconds: list[float]) -> None:
    (folder / "configs").mkdir(parents=True)
    event = {"time": "2026-01-01T00:00:00", "kind": "start", "step": 0, "images_per_step": images}
    (folder / "events.jsonl").write_text(json.dumps(event | {"command": ["main.py", "--base", *configs]}) + "\n")
    (folder / "csv/version_0").mkdir(parents=True)
    with (folder / "csv/version_0/metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "device/step_seconds"])
        rows.writerows(enumerate(seconds))


def test_measured_speeds_are_of_the_newest_run_with_the_config(tmp_path: Path) -> None:
    write_run(tmp_path / "2026-01-01_a", ["x.yaml"], 8, [9.0, 2.0, 2.0])
    write_run(tmp_path / "2026-01-02_b", ["/some/x.yaml", "lean.yaml", "out/recipe.yaml"], 8, [4.0])
    write_run(tmp_path / "2026-01-03_c", ["y.yaml"], 8, [1.0])
    assert measured_speeds(tmp_path, "configs/x.yaml") == {"as given": 4.0, "lean.yaml": 2.0}
    assert measured_speeds(tmp_path / "missing", "x.yaml") == {}
