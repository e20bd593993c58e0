"""The studio in Chromium: the whole recipe by clicks on the tiny model, mistakes and their messages, accessibility."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from ldm.checkpoint import load_state_dict
from ldm.planning import TIERS
from tests.browser.studio_process import WORK, StudioProcess, running_studio
from tests.browser.watched import check, overflow
from tests.conftest import ROOT

RELEASE = ROOT / "data/base/emoji.safetensors"
NAMES = ("tom-face", "tom-crying", "tom-weary")
TABS = ("Images", "Plan", "Train", "Compare", "Release")
ENDLESS = "1000000"  # steps of a training that is stopped by a click


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioProcess]:
    """Start the studio with the values of the demo, beside folders of images and a broken checkpoint."""
    folder = tmp_path_factory.mktemp("studio")
    for name in ("images", "odd"):
        (folder / name).mkdir()
        for image in NAMES:
            shutil.copy(ROOT / f"data/cats/{image}.png", folder / name)
            (folder / name / f"{image}.txt").write_text(f"tom the cat, {image.removeprefix('tom-')}")
    (folder / "odd/broken <b>.png").write_bytes((folder / "odd/tom-face.png").read_bytes()[:300])
    (folder / "broken.safetensors").write_bytes(RELEASE.read_bytes()[:100_000])
    with running_studio(folder, "--demo") as process:
        yield process


@pytest.fixture
def open_studio(studio: StudioProcess, open_page) -> Callable[..., Page]:
    """Return a function that opens the studio, and waits until its fields are filled."""

    def open_(*arguments: int, **options: bool) -> Page:
        page = open_page(studio.address, *arguments, **options)
        wait_for_fields(page)
        return page

    return open_


def wait_for_fields(page: Page) -> None:
    expect(field(page, "images-folder")).not_to_have_value("")


def field(page: Page, name: str) -> Locator:
    return page.locator(f"#{name} textarea, #{name} input").first


def fill(page: Page, name: str, text: str) -> None:
    field(page, name).fill(text)
    field(page, name).blur()


def choose(page: Page, name: str, option: int) -> None:
    """Choose the option of this number in a list."""
    field(page, name).click()
    page.get_by_role("option").nth(option).click()


def thumbnail(page: Page, caption: str) -> Locator:
    return page.locator("#images-gallery button", has=page.get_by_alt_text(caption))


def expect_message(page: Page, text: str) -> None:
    expect(page.get_by_role("status").filter(has_text=text).first).to_be_visible()


def go_to(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab).click()
    expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")


def visible_tabs(page: Page) -> list[str]:
    """Return the tabs, after a check that the window has room for all. Gradio puts others into a menu."""
    for tab in TABS:
        expect(page.get_by_role("tab", name=tab)).to_be_visible()
    return list(TABS)


def test_each_tab_is_accessible_and_fits(open_studio) -> None:
    for width, dark in ((1280, False), (390, True)):
        page = open_studio(width, dark=dark)
        page.locator("#images-open").click()
        expect(page.locator("#images-gallery img").first).to_be_visible()
        for tab in visible_tabs(page):
            go_to(page, tab)
            check(page)
    for width, dark in ((1280, True), (390, False)):
        page = open_studio(width, dark=dark)
        for tab in visible_tabs(page):
            go_to(page, tab)
            assert overflow(page) == 0


def test_broken_images_and_other_folders_are_told(open_studio) -> None:
    page = open_studio()
    summary = page.locator("#images-summary")
    fill(page, "images-folder", "odd")
    page.locator("#images-open").click()
    expect(summary).to_contain_text("4 images, 1 without a caption")
    expect(summary).to_contain_text("1 on this page cannot be read")
    thumbnail(page, "cannot be read: broken <b>.png").click()
    expect(page.locator("#images-name")).to_contain_text("broken <b>.png")
    for folder, message in (("nowhere", "no such file or folder"), ("/etc", "lies outside of the folders")):
        fill(page, "images-folder", folder)
        page.locator("#images-open").click()
        expect_message(page, message)


def test_a_broken_checkpoint_is_told(open_studio) -> None:
    page = open_studio()
    go_to(page, "Plan")
    recognised = page.locator("#plan-recognised")
    expect(recognised).to_contain_text("predicts v; trained with demo_tiny.yaml")
    fill(page, "plan-base", "")
    fill(page, "plan-release", "broken.safetensors")
    expect(recognised).to_contain_text("broken.safetensors")
    expect(recognised.locator(".studio-bad")).to_be_visible()
    go_to(page, "Train")
    page.locator("#train-start").click()
    expect_message(page, "broken.safetensors")
    expect(page.locator("#train-status")).to_contain_text("No training yet")


def test_captions_are_edited_by_keys(studio: StudioProcess, open_studio) -> None:
    page, caption = open_studio(), studio.folder / "images/tom-crying.txt"
    fill(page, "images-folder", "images")
    page.locator("#images-open").press("Enter")
    thumbnail(page, "crying").press("Enter")
    expect(field(page, "images-caption")).to_have_value("tom the cat, crying")
    field(page, "images-caption").fill('tom the cat, in "tears" & more\n')
    page.locator("#images-save").press("Enter")
    expect(page.locator("#images-summary")).to_contain_text("saved the caption")
    assert caption.read_text().strip() == 'tom the cat, in "tears" & more'
    page.locator("#images-undo").press("Space")
    expect(field(page, "images-caption")).to_have_value("tom the cat, crying")
    assert caption.read_text() == "tom the cat, crying"


def test_the_recipe_by_clicks(studio: StudioProcess, open_studio) -> None:
    page = open_studio()
    fill(page, "images-folder", "images")
    page.locator("#images-open").click()
    expect(page.locator("#images-gallery img")).to_have_count(len(NAMES))
    go_to(page, "Plan")
    fill(page, "plan-steps", ENDLESS)
    fill(page, "plan-prompts", "")
    page.locator("#plan-compute").click()
    studio.wait_for_state(page, "plan", "running")  # it ends during the training
    page.locator("#plan-write").click()
    go_to(page, "Train")
    expect(page.locator("#train-resume-command")).to_contain_text("no run is chosen")
    page.locator("#train-start").click()
    studio.wait_for_state(page, "train", "running")
    page.reload()  # nothing stops
    wait_for_fields(page)
    go_to(page, "Train")
    studio.wait_for_state(page, "train", "running", "step ")

    other = open_studio()  # a second tab sees and does the same
    go_to(other, "Train")
    studio.wait_for_state(other, "train", "running", "step ")
    expect(other.locator("#train-start")).to_be_disabled()
    other.locator("#train-stop").click()
    studio.wait_for_state(page, "train", "stopped")

    page.locator("#train-resume").click()
    studio.wait_for_state(page, "train", "running", "step ")
    page.locator("#train-save").click()
    page.locator("#train-stop").click()
    studio.wait_for_state(page, "train", "stopped")
    assert len(studio.jobs.list("train")) == 2

    assert ENDLESS in (studio.folder / WORK / "cats/recipe.yaml").read_text()
    go_to(page, "Release")
    page.locator("#release-refresh").click()
    expect(field(page, "release-run")).not_to_have_value("")  # else Merge has no run, and starts nothing
    fill(page, "release-out", "mine.safetensors")
    page.locator("#release-merge").click()
    studio.wait_for_state(page, "release", "finished")
    before, after = load_state_dict(RELEASE), load_state_dict(studio.folder / "mine.safetensors")
    assert before.keys() == after.keys()
    assert {key.split(".")[0] for key in before if not before[key].equal(after[key])} == {"model"}
    with page.context.expect_page() as opened:
        page.locator("#release-links").get_by_role("link", name="report").click()
    expect(opened.value.get_by_role("row", name="state stopped")).to_be_visible()
    check(opened.value)
    with page.expect_download() as download:
        page.locator("#release-links").get_by_role("link", name="Download").click()
    assert Path(download.value.path()).stat().st_size == (studio.folder / "mine.safetensors").stat().st_size

    go_to(page, "Plan")
    studio.wait_for_state(page, "plan", "finished")
    table = page.locator("#plan-table")
    for tier in ("as given", *TIERS):
        expect(table.get_by_role("row", name=tier)).not_to_contain_text("does not fit")
    expect(table).to_contain_text("Choose no tier, with up to")


def test_the_command_is_that_of_the_job(studio: StudioProcess, open_studio) -> None:
    page, command = open_studio(), "#compare-command"
    go_to(page, "Compare")
    fill(page, "compare-tuned", str(RELEASE))
    expect(page.locator(command)).to_contain_text("compare/1/right")
    (studio.folder / WORK / "compare/1").mkdir(parents=True)  # as by a job from another window
    page.locator("#compare-start").click()
    expect(page.locator(command)).to_contain_text("compare/2/right")
    assert "compare/2/right" in str(studio.jobs.newest("compare").steps[1])
    page.locator("#compare-stop").click()
    studio.wait_for_state(page, "compare", "stopped")
