#!/usr/bin/env python
"""Screenshots of the report and the studio for the documentation, after a training of the demo's model.

    python benchmarks/screenshots.py --out docs/screenshots

Needs Chromium. The training runs in a copy of the checkout, so that its files and paths are those of a new user.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser.chromium import MISSING, find_chromium, start_chromium  # noqa: E402
from tests.browser.studio_process import running_studio  # noqa: E402
from tests.waiting import LIMIT  # noqa: E402

COPIED = ("configs", "data/base", "data/cats", "ldm", "tools", "main.py")
HELD_OUT = ("tom-grinning", "tom-crying", "tom-kissing")
RELEASE = "data/base/emoji.safetensors"
ENCODE = ("tools/preencode.py", "--ckpt", RELEASE, "--config", "demo_tiny_release.yaml", "--size", "64")
PROMPTS = "tom the cat, grinning --s 20 --l 3\ndog face --s 20 --l 3\nred heart --s 20 --l 3\n"
TRAIN = (
    *("main.py", "--resume", "start.ckpt", "--base", "demo_tiny.yaml", "-t", "--no-test", "--name", "cats"),
    *("--previews", "prompts.txt", "lightning.previews.every_n_train_steps=50"),
    *("lightning.previews.config=demo_tiny_release.yaml", "lightning.trainer.log_every_n_steps=2"),
    *("data.params.training_urls=shards/cats/*.tar", "data.params.val_urls=shards/others/*.tar"),
    *("--val_check_interval", "20"),
)
WIDTHS = ((1280, 860, False), (390, 844, True))  # width and height in pixels, and whether the scheme is dark
QUALITY = 82
LOADED = "[...document.querySelectorAll('#images-gallery img')].every(image => image.complete && image.naturalWidth)"


def run(folder: Path, *words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=folder, check=True)


def train(folder: Path, steps: int) -> Path:
    """Train in the copy of the checkout at `folder`, and return the path of the report."""
    for name in ("cats", "others"):
        (folder / name).mkdir()
    for path in sorted(folder.glob("data/cats/*.png")):
        place = folder / ("others" if path.stem in HELD_OUT else "cats")
        shutil.copy(path, place)
        caption = path.stem.replace("tom-", "tom the cat, ").replace("-", " ")
        (place / f"{path.stem}.txt").write_text(caption)
    run(folder, *ENCODE, "--images", "cats", "--out", "shards/cats/%06d.tar")
    run(folder, *ENCODE, "--images", "others", "--out", "shards/others/%06d.tar")
    run(folder, "tools/hack_weights.py", "--release", RELEASE, "--base", "demo_tiny.yaml", "--out", "start.ckpt")
    (folder / "prompts.txt").write_text(PROMPTS)
    run(folder, *TRAIN, "--max_steps", str(steps))
    [logs] = (folder / "logs").iterdir()
    run(folder, "tools/report.py", str(logs.relative_to(folder)), "--samples", "10")
    return logs / "report.html"


def open_page(browser: Browser, url: str, size: Sequence[int], dark: bool) -> Page:
    viewport = {"width": size[0], "height": size[1]}
    context = browser.new_context(viewport=viewport, color_scheme="dark" if dark else "light")
    context.set_default_timeout(1000 * LIMIT)
    page = context.new_page()
    page.goto(url)
    return page


def open_studio(browser: Browser, url: str, size: Sequence[int], dark: bool) -> Page:
    """Open the studio, and wait until its fields are filled."""
    page = open_page(browser, url, size, dark)
    expect(page.locator("#images-folder textarea, #images-folder input").first).not_to_have_value("")
    return page


def save(page: Page, path: Path) -> None:
    """Save what the window shows as a WebP file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(page.screenshot(animations="disabled"))).save(path, quality=QUALITY, method=6)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def show_report(browser: Browser, report: Path, out: Path) -> None:
    for width, height, dark in WIDTHS:
        page = open_page(browser, report.as_uri(), (width, height), dark)
        for name in ("Curves", "Images"):
            page.get_by_role("heading", name=name, exact=True).evaluate("part => part.scrollIntoView()")
            save(page, out / f"report-{name.lower()}-{width}.webp")


def show_studio(browser: Browser, folder: Path, out: Path) -> None:
    """Save images, plan and training of the demo, in a studio that serves the copy of the checkout at `folder`."""
    with running_studio(folder, "--demo", checkout=folder) as studio:
        for width, height, dark in WIDTHS:
            page = open_studio(browser, studio.address, (width, height), dark)
            page.locator("#images-open").click()
            page.locator("#images-gallery button img").nth(9).wait_for()
            page.wait_for_function(LOADED)
            save(page, out / f"studio-images-{width}.webp")
            page.get_by_role("tab", name="Plan", exact=True).click()
            expect(page.locator("#plan-command")).to_contain_text("plan_memory.py")
            save(page, out / f"studio-plan-{width}.webp")
        for number, (width, height, dark) in enumerate(WIDTHS):
            page = open_studio(browser, studio.address, (width, height), dark)
            page.get_by_role("tab", name="Train", exact=True).click()
            if not number:
                page.locator("#train-start").click()
            page.get_by_text("Loss by band of timesteps").wait_for()
            page.locator("#train-status").evaluate("part => part.scrollIntoView()")
            page.wait_for_function(LOADED.replace("images-gallery", "train-previews"))
            save(page, out / f"studio-train-{width}.webp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/screenshots", help="folder of the images")
    parser.add_argument("--steps", type=int, default=150, help="training steps of the report's run")
    options = parser.parse_args()
    if find_chromium() is None:
        raise SystemExit(f"error: {MISSING}")
    expect.set_options(timeout=1000 * LIMIT)  # milliseconds
    with tempfile.TemporaryDirectory(prefix="latent-finetune-") as name, sync_playwright() as playwright:
        folder, browser = Path(name), start_chromium(playwright)
        for part in COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / part, folder / part)
        report = train(folder, options.steps)
        show_report(browser, report, options.out)
        show_studio(browser, folder, options.out)


if __name__ == "__main__":
    main()
