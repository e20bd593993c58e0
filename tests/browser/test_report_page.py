"""Reports in Chromium, without a network: figures, images, sliders, widths, both colour schemes, accessibility."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, expect

from ldm.events import END, EVENTS
from ldm.locks import LOCK, locked
from ldm.reporting.report_file import write_report
from ldm.reporting.training_sets import SampleLimits
from tests.browser.watched import check
from tests.run_folders import write_evaluation, write_run
from tests.training_runs import run_main, the_run, write_inputs, write_release

MOST_BYTES = 8_000_000
OPTIONS = (
    "-b tiny.yaml -t --no-test --max_steps 4 --val_check_interval 2 data.params.val_urls=shards/s-000001.tar"
    " --previews prompts.txt lightning.previews.release=release.safetensors lightning.previews.config=release.yaml"
    " lightning.previews.every_n_train_steps=2"
    " lightning.callbacks.norms.target=ldm.callbacks.block_norms.BlockNorms"
    " lightning.callbacks.norms.params.every_n_train_steps=1"
    " lightning.callbacks.watched.target=ldm.callbacks.forgetting.Forgetting"
    " lightning.callbacks.watched.params.every_n_train_steps=2"
    " lightning.callbacks.watched.params.sets.others=shards/s-000001.tar"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Train on the tiny model with everything that a report shows, and return the run folder."""
    folder, threads = tmp_path_factory.mktemp("trained"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_inputs(folder)
        write_release(folder)
        (folder / "prompts.txt").write_text('a red apple --s 2\n<b>&"quoted" --s 2\n')
        run_main(patch, OPTIONS)
        run = the_run(folder / "logs")
        write_evaluation(run / "evaluation/evaluation.json", "others <i>")
        yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def report(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the report of the run."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    write_report([trained], out, SampleLimits(3))
    return out


WIDE, NARROW = (1280, False), (390, True)  # widths in pixels, light and dark


def look(open_page: Callable[..., Page], path: Path, sizes: Sequence[tuple[int, bool]] = (WIDE, NARROW)) -> Page:
    """Check the page at `path` in the `sizes`, and return the last."""
    assert path.stat().st_size < MOST_BYTES
    for width, dark in sizes:
        page = open_page(path.as_uri(), width, dark=dark, offline=True)
        page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
        check(page)
    return page


def test_the_report_of_a_run_is_drawn(report: Path, open_page) -> None:
    page = look(open_page, report, [(1280, True), (390, False), WIDE, NARROW])
    figures = page.locator("figcaption")
    for title in ("Loss of training", "Held-out loss minus", "Loss by band", "Watched sets: drift", "Learning rate",
                  "Norm of the gradient", "Seconds per step", "Drift by timestep", "a-red-apple, step 4"):  # fmt: skip
        expect(figures.filter(has_text=title).first).to_be_visible()
    expect(page.get_by_role("row", name="state finished")).to_be_visible()
    assert page.locator(".sheet img").count() == 3


def test_a_slider_is_moved_by_keys(report: Path, open_page) -> None:
    page = open_page(report.as_uri(), offline=True)
    strip = page.locator(".strip").first
    slider, shown = strip.get_by_role("slider"), strip.locator(".frame:visible")
    slider.press("Home")
    for step, key in ((0, "ArrowRight"), (2, "ArrowRight"), (4, "ArrowLeft"), (2, "End"), (4, "Home")):
        expect(strip.locator("output")).to_have_text(f"step {step}")
        expect(slider).to_have_attribute("aria-valuetext", f"step {step}")
        expect(shown).to_have_count(1)
        expect(shown).to_have_attribute("data-step", str(step))
        slider.press(key)


def test_tab_reaches_all_that_scrolls_or_moves(report: Path, open_page) -> None:
    page = open_page(report.as_uri(), 390, offline=True)
    wanted = page.locator("input:visible, summary:visible, [tabindex='0']:visible").count()
    reached = set()
    for _ in range(wanted):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("""() => {
            const style = getComputedStyle(document.activeElement);
            if (style.outlineStyle === "none") throw new Error("no outline: " + document.activeElement.outerHTML);
            return [...document.querySelectorAll("*")].indexOf(document.activeElement);
        }""")
        )
    assert len(reached) == wanted > 10


def test_reports_of_a_run_under_way_and_of_a_killed_one(trained: Path, tmp_path: Path, open_page) -> None:
    run, out = tmp_path / "run", tmp_path / "report.html"
    shutil.copytree(trained, run)
    lines = (run / EVENTS).read_text().splitlines()
    (run / EVENTS).write_text("\n".join(line for line in lines if json.loads(line)["kind"] != END) + '\n{"time": "20')
    csv = max(run.glob("csv/*/metrics.csv"))
    csv.write_text(csv.read_text() + "0.5,")
    with locked(run / LOCK, "run"):
        write_report([run], out)
        page = open_page(out.as_uri(), offline=True)
        expect(page.get_by_role("row", name="state under way")).to_be_visible()
    write_report([run], out)
    page = look(open_page, out)
    expect(page.get_by_role("row", name="state killed, or under way")).to_be_visible()
    expect(page.get_by_role("listitem")).to_have_text(
        ["events.jsonl: 1 damaged line left out", "csv/version_0/metrics.csv: 1 damaged line left out"]
    )


def test_the_report_of_a_folder_with_nothing_but_a_checkpoint(tmp_path: Path, open_page) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt").write_bytes(b"damaged")
    write_report([tmp_path / "run"], tmp_path / "report.html", SampleLimits(3))
    expect(look(open_page, tmp_path / "report.html").get_by_text("tools/merge_release.py")).to_be_visible()


def test_a_comparison_of_three_runs_one_with_many_large_images(trained: Path, tmp_path: Path, open_page) -> None:
    other = write_run(tmp_path / "a-run-with-a-long-name_" / ("x" * 60))
    noise = np.random.default_rng(0).integers(0, 256, (12, 512, 512, 3), dtype=np.uint8)
    (other / "previews").mkdir()
    for step, pixels in enumerate(noise):
        image = Image.fromarray(pixels)
        image.save(other / f"previews/01-noise_gs-{step:06}_e-000000_b-000000.png", compress_level=1)
    out = tmp_path / "comparison.html"
    killed = write_run(tmp_path / "killed")
    (killed / "images").rename(tmp_path / "images")
    write_report([trained, other, killed], out)
    page = look(open_page, out)
    expect(page.get_by_role("heading", name="Comparison of 3 runs")).to_be_visible()
    assert 2 <= page.get_by_alt_text("01-noise").count() < len(noise)  # thinned to the size of the page
    expect(page.get_by_role("img", name="Loss of training", exact=True)).to_be_visible()
    page.get_by_role("navigation").get_by_role("link", name="2: x").click()
    expect(page.get_by_role("heading", name="Run 2: x")).to_be_in_viewport()
