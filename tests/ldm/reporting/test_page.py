from __future__ import annotations

import html
import json
import re
from pathlib import Path

from ldm.reporting.page import write_page
from ldm.reporting.run_folder import read_run
from ldm.reporting.strips import Shown
from ldm.reporting.training_sets import Contents
from tests.run_folders import METRICS, write_evaluation, write_metrics, write_run


def page_of(*folders: Path, change=lambda runs: None) -> str:
    runs = [read_run(folder, 1 << 20) for folder in folders]
    change(runs)
    out = folders[0] / "report.html"
    write_page(runs, out)
    return out.read_text(encoding="utf-8")


def cells_of(page: str) -> list[list[str]]:
    """Text of the cells of each row of the tables."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]


def test_write_page_has_the_numbers_of_the_csv(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    assert ["train/loss_simple", "0.75", "0.4321", "2", "0.4321", "2"] in cells_of(page)
    assert ["val/loss_simple", "0.9", "0.8125", "2", "0.8125", "2"] in cells_of(page)
    assert page.count("<svg") == 1
    assert page.count('src="data:image/webp;base64,') == len(METRICS)
    assert f'max="{len(METRICS) - 1}"' in page


def test_write_page_loads_nothing(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "run/evaluation/evaluation.json")
    page = page_of(write_run(tmp_path / "run"))
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert not re.search(r"url\((?!#)|@import|fetch\(", page)
    assert ["cats", "7", "0.25000", "0.12500", "0.5", "0.0625"] in cells_of(page)


def test_write_page_escapes_text_of_others(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\x1b[2J\u202e"
    run = write_run(tmp_path / "run", note=evil)
    (run / "events.jsonl").write_text(json.dumps({"time": "2026", "kind": "warning", "text": evil}) + "\n")
    write_evaluation(run / "evaluation/evaluation.json", evil)

    def add_caption(runs: list) -> None:
        runs[0].contents = Contents([Shown(evil, 1, 1, "data:,")], [evil])

    page = page_of(run, change=add_caption)
    assert "<script>alert" not in page and "\x1b" not in page and "\u202e" not in page
    assert page.count("<script>") == 1
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)") >= 4


def test_write_page_compares_runs(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", report=False)
    write_metrics(other, 1, {2: (0.25, None), 3: (0.125, None)})
    rows, state = cells_of(page_of(one, other)), "not recorded how it ended"
    assert ["1: one", state, "3"] in rows and ["2: other", state, "4"] in rows
    assert ["training loss", "0.4321", "0.125"] in rows
    assert ["lightning.report", "–", "false"] in rows
    assert not [row for row in rows if row[:1] == ["data.params.batch_size"] and len(set(row)) == 2]


def test_write_page_of_a_folder_with_nothing_but_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt").write_bytes(b"damaged")
    page = page_of(tmp_path / "run")
    assert "tools/merge_release.py" in page and "<svg" not in page
