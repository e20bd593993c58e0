"""The studio in Chromium: the whole recipe by clicks on the tiny model, mistakes and their messages, accessibility."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from ldm.checkpoint import load_state_dict
from ldm.planning import TIERS
from ldm.studio.job_store import JobStore
from ldm.studio.strength_part import STRENGTHS
from tests.browser.studio_process import WORK, StudioProcess, running_studio
from tests.browser.watched import Watch, check, overflow
from tests.conftest import ROOT
from tests.run_folders import write_evaluation
from tests.waiting import LIMIT

RELEASE = ROOT / "data/base/emoji.safetensors"
NAMES = ("tom-face", "tom-crying", "tom-weary")
AWKWARD = '-it\'s "a"\nline.png'
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
    shutil.copy(folder / "odd/tom-face.png", folder / "odd" / AWKWARD)
    (folder / "odd" / AWKWARD).with_suffix(".txt").write_text("an awkward name")
    (folder / "odd/broken <b>.png").write_bytes((folder / "odd/tom-face.png").read_bytes()[:300])
    (folder / "broken.safetensors").write_bytes(RELEASE.read_bytes()[:100_000])
    with running_studio(folder, "--demo") as process:
        yield process


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def window(browser: Browser, watch: Watch) -> Iterator[Page]:
    """Open a window for all tests. Its cache keeps the scripts of the page, which take seconds to parse."""
    context = browser.new_context()
    context.set_default_timeout(1000 * LIMIT)
    watch.follow(context)
    yield context.new_page()
    context.close()


@pytest.fixture
def open_studio(studio: StudioProcess, window: Page, watch: Watch) -> Iterator[Callable[..., Page]]:
    """Return a function that opens the studio afresh, and waits until its fields are filled.

    The test fails at its end if the page had a fault that `Watch` finds.
    """

    def open_(width: int = 1280, *, dark: bool = False) -> Page:
        window.set_viewport_size({"width": width, "height": 900})
        window.emulate_media(color_scheme="dark" if dark else "light")
        window.goto(studio.address)
        wait_for_fields(window)
        return window

    yield open_
    window.goto("about:blank")  # an open page goes on asking the studio
    faults, watch.faults = watch.faults, []
    assert not faults, "\n".join(faults)


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


def test_broken_images_and_other_folders_are_told(studio: StudioProcess, open_studio) -> None:
    page = open_studio()
    summary = page.locator("#images-summary")
    fill(page, "images-folder", "odd")
    page.locator("#images-open").click()
    expect(summary).to_contain_text("5 images, 1 without a caption")
    expect(summary).to_contain_text("1 on this page cannot be read")
    thumbnail(page, "cannot be read: broken <b>.png").click()
    expect(page.locator("#images-name")).to_contain_text("broken <b>.png")
    thumbnail(page, "an awkward name").click()
    expect(field(page, "images-caption")).to_have_value("an awkward name")
    fill(page, "images-caption", "a new caption")
    page.locator("#images-save").click()
    expect(summary).to_contain_text('saved the caption of -it\'s "a"\\nline.png')
    assert (studio.folder / "odd" / AWKWARD).with_suffix(".txt").read_text().strip() == "a new caption"
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

    fill(page, "images-find", "tom")
    fill(page, "images-replace", "ann & co")
    page.locator("#images-replace-all").press("Enter")
    expect(page.locator("#images-summary")).to_contain_text("changed 3 captions")
    assert caption.read_text().strip() == "ann & co the cat, crying"
    page.get_by_role("button", name="Tags").press("Enter")
    expect(page.locator("#images-tags").get_by_role("row", name="ann & co the cat 3")).to_be_visible()
    page.locator("#images-undo").press("Enter")
    expect(page.locator("#images-summary")).to_contain_text("undone: 3 files")
    assert caption.read_text() == "tom the cat, crying"


def test_a_problem_leads_to_its_image(studio: StudioProcess, open_studio) -> None:
    problems = [{"name": "broken <b>.png", "text": "cannot be read"}, {"name": AWKWARD, "text": "a <i> problem"}]
    (studio.folder / WORK / "problems.json").write_text(json.dumps({"problems": problems}))
    write_job(studio.jobs, "images-check", {"folder": "odd"})
    page = open_studio()
    page.get_by_role("radio", name="a <i> problem").check()
    expect(page.locator("#images-name")).to_contain_text("line.png")
    expect(page.locator("#images-gallery button[aria-label='Thumbnail 1 of 5']")).to_have_class(re.compile("selected"))
    page.get_by_role("radio", name="cannot be read").check()
    expect(page.locator("#images-name")).to_contain_text("broken <b>.png")


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

    other = page.context.new_page()  # a second tab sees and does the same
    other.goto(studio.address)
    wait_for_fields(other)
    go_to(other, "Train")
    studio.wait_for_state(other, "train", "running", "step ")
    expect(other.locator("#train-start")).to_be_disabled()
    other.locator("#train-stop").click()
    studio.wait_for_state(page, "train", "stopped")
    other.close()

    expect(page.locator("#train-resume-command")).not_to_contain_text("no run is chosen")  # else it starts nothing
    page.locator("#train-resume").click()
    studio.wait_for_state(page, "train", "running", "step ")
    page.locator("#train-save").click()
    page.locator("#train-stop").click()
    studio.wait_for_state(page, "train", "stopped")
    assert len(studio.jobs.list("train")) == 2

    assert ENDLESS in (studio.folder / WORK / "cats/recipe.yaml").read_text()
    go_to(page, "Release")
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


def write_job(store: JobStore, kind: str, about: dict[str, Any], log: str = "", code: int = 0) -> None:
    """Write a job that has ended, and that is newer than all others of its kind."""
    folder = store.folder / f"9999-{kind}-{len(store.list(kind)):02}"
    folder.mkdir(parents=True)
    steps = [{"title": "A step", "words": ["tool.py"]}]
    job = {"kind": kind, "title": f"The {kind}", "steps": steps, "started": 0, "about": about}
    state = {"runner": [1, 1], "child": None, "step": 0, "codes": [code], "times": [0, 65], "ended": True}
    for name, content in (("job.json", job), ("state.json", state)):
        (folder / name).write_text(json.dumps(content))
    (folder / "log-0.txt").write_text(log)


def sampled(folder: Path, *colours: str) -> str:
    """Write an image of each colour into a folder of samples, and return the folder's path in the studio."""
    folder.mkdir(parents=True)
    for number, colour in enumerate(colours):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number:05}.png")
    return str(folder)


def colour_at(page: Page, name: str, part: float) -> tuple[int, ...]:
    """Return the colour in the middle of an element's height, at this part of its width."""
    image = Image.open(io.BytesIO(page.locator(name).screenshot()))
    return image.convert("RGB").getpixel((int(part * image.width), image.height // 3))


RED, LIME, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_results_are_looked_at_by_keys(studio: StudioProcess, open_studio) -> None:
    outputs = studio.folder / WORK / "shown"
    sides = {side: sampled(outputs / side, *colours) for side, colours in
             (("left", ("red", "blue")), ("right", ("lime", "black")))}  # fmt: skip
    write_job(studio.jobs, "compare", {"labels": ["a <b> (seed 1)", "b (seed 1)"], "folders": sides})
    strengths = {f"{value:g}": sampled(outputs / f"{value:g}", colour) for value, colour in
                 zip(STRENGTHS, ("red", "lime", "blue", "black", "white"), strict=True)}  # fmt: skip
    write_job(studio.jobs, "strength", {"labels": ["a (seed 1)"], "folders": strengths})
    write_evaluation(outputs / "evaluation/evaluation.json", "cats <i>")
    Image.new("RGB", (300, 200), "blue").save(outputs / "evaluation/evaluation.png")
    write_job(studio.jobs, "evaluate", {"out": str(outputs / "evaluation")})

    page = open_studio(390, dark=True)
    go_to(page, "Compare")
    slider = page.locator("#compare-slider").get_by_role("slider")
    expect(slider).to_have_value("50")
    expect(page.get_by_alt_text("right: a <b> (seed 1)")).to_be_visible()
    check(page)
    for key, part, colour in (("Home", 0.05, LIME), ("End", 0.95, RED), ("PageDown", 0.95, LIME)):
        slider.press(key)
        assert colour_at(page, "#compare-slider .studio-slider", part) == colour
    choose(page, "compare-pair", 1)
    expect(page.get_by_alt_text("left: b (seed 1)")).to_be_visible()

    shown = page.locator("#strength-images img")
    expect(shown).to_have_count(1)
    first = shown.get_attribute("src")
    page.get_by_role("slider", name="range slider for Strength").press("Home")
    expect(shown).not_to_have_attribute("src", first)
    expect(page.locator("#evaluate-table").get_by_role("row", name="cats <i>")).to_contain_text("0.12500")
    expect(page.locator("#evaluate-figure img")).to_be_visible()
    check(page)


def test_a_plan_is_chosen_and_written(studio: StudioProcess, open_studio) -> None:
    fits = [{"tier": tier, "images": images, "peak": images << 28, "host": 1 << 30, "parts": {"weights": 1 << 30}}
            for tier, images in (("as given", 0), ("fast.yaml", 0), ("lean.yaml", 6))]  # fmt: skip
    answer = json.dumps({"tiers": fits, "use": "lean.yaml"})
    write_job(studio.jobs, "plan", {"base": "demo_tiny.yaml", "minutes": 0}, f"a line\n{answer}\n")
    page = open_studio()
    go_to(page, "Plan")
    table = page.locator("#plan-table")
    expect(table.get_by_role("row", name="lean.yaml 6 1.50 1.00 1.00")).to_have_class("studio-good")
    expect(table.get_by_role("row", name="fast.yaml")).to_contain_text("does not fit")
    expect(table).to_contain_text("Choose the tier lean.yaml, with up to 6 images per step")
    choose(page, "plan-tier", 2)
    for name, text in (("name", "planned"), ("batch", "6"), ("steps", "7"), ("minutes", "90"), ("rate", "0.5"),
                       ("prompts", "a \"cat\"\n: b"), ("preview-steps", "3")):  # fmt: skip
        fill(page, f"plan-{name}", text)
    page.locator("#plan-write").click()
    expect(page.locator("#plan-yaml")).to_contain_text("max_steps: 7")
    assert yaml.safe_load((studio.folder / WORK / "planned/recipe.yaml").read_text()) == {
        "model": {"base_learning_rate": 0.5},
        "data": {"params": {"training_urls": f"{WORK}/planned/shards/*.tar", "batch_size": 6}},
        "lightning": {
            "trainer": {"max_steps": 7, "max_time": "00:01:30:00"},
            "previews": {"prompts": ['a "cat"', ": b"], "every_n_train_steps": 3, "config": "demo_tiny_release.yaml"},
        },
    }
    go_to(page, "Train")
    files = f"--base demo_tiny.yaml lean.yaml {WORK}/planned/recipe.yaml"
    expect(page.locator("#train-commands")).to_contain_text(files)


def test_written_files_and_failures_are_told(studio: StudioProcess, open_studio) -> None:
    (studio.folder / "folder").mkdir()
    lora = studio.folder / 'it\'s a "lora".safetensors'
    lora.write_bytes(b"x" * 1000)
    write_job(studio.jobs, "release", {"out": "folder/", "report": "none.html"})
    write_job(studio.jobs, "lora", {"out": lora.name})
    write_job(studio.jobs, "plan", {}, "a line\nerror: broken <b>.ckpt: damaged\n", code=1)
    page = open_studio()
    go_to(page, "Release")
    expect(page.locator("#release-links")).to_contain_text("folder")
    page.get_by_role("button", name="Extract a LoRA").click()
    with page.expect_download() as download:
        page.locator("#lora-links").get_by_role("link", name="Download").click()
    assert Path(download.value.path()).read_bytes() == lora.read_bytes()
    go_to(page, "Plan")
    expect(page.locator("#plan-status .studio-bad").last).to_have_text("error: broken <b>.ckpt: damaged")
    expect(page.locator("#plan-status")).to_contain_text("failed, 1 min 5 s")


USABLE = """() => {
    const parts = [...document.querySelectorAll("button, input, textarea, a[href], [tabindex]")];
    window.usable = parts.filter(part => part.checkVisibility({visibilityProperty: true}) && !part.disabled
        && part.tabIndex >= 0 && !part.closest("[inert]"));
    window.reached = new Set();
    document.addEventListener("focusin", event => window.reached.add(window.usable.indexOf(event.target)));
    return window.usable.map(part => part.outerHTML.slice(0, 200));
}"""


def test_tab_reaches_all_that_can_be_used(open_studio) -> None:
    page = open_studio()
    for tab in TABS:
        go_to(page, tab)
        wanted = page.evaluate(USABLE)
        for _ in range(len(wanted) + 5):  # some are reached twice, and so is the window
            page.keyboard.press("Tab")
        reached = page.evaluate("[...window.reached]")
        assert [part for number, part in enumerate(wanted) if number not in reached] == []
        assert len(wanted) > 10
