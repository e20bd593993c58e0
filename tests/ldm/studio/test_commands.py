"""Tests of the command lines of the studio."""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ldm.studio.commands import (
    ROOT,
    SampleSettings,
    Step,
    TrainingRecipe,
    evaluate_words,
    hack_words,
    inspect_words,
    lora_words,
    merge_words,
    option,
    path_word,
    pipeline,
    plan_words,
    preencode_words,
    recipe_values,
    report_words,
    resume_words,
    sample_words,
    shown,
    train_words,
)
from ldm.training.arguments import parse_arguments
from ldm.util import UserError

RECIPE = TrainingRecipe("cats", "data/cats", "r.safetensors", "demo_tiny.yaml", config="demo_tiny_release.yaml")
AWKWARD = '-it\'s "a" $(touch x)\n;&|* file'


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_pipeline_is_the_recipe_of_the_readme() -> None:
    lines = [str(step) for step in pipeline(replace(RECIPE, size=64, flip=True, tier="lean.yaml", gpu=True))]
    work = "outputs/studio/cats"
    assert lines == [
        "python tools/preencode.py --ckpt r.safetensors --config demo_tiny_release.yaml --images data/cats "
        f"--out {work}/shards/%06d.tar --size 64 --flip",
        f"python tools/hack_weights.py --release r.safetensors --out {work}/start.ckpt --base demo_tiny.yaml",
        f"python main.py --resume {work}/start.ckpt --base demo_tiny.yaml lean.yaml {work}/recipe.yaml -t --no-test "
        "--gpus 0, --name cats",
    ]


def test_a_recognised_family_is_told_to_all_tools() -> None:
    recipe = replace(RECIPE, config="", base="f.yaml", is_family=True, predicts="v", overrides=("model.params.a=1",))
    preencode, hack, train = [str(step) for step in pipeline(recipe)]
    assert "--parameterization v" in preencode and "--config" not in preencode
    assert hack.endswith("--parameterization v --out outputs/studio/cats/start.ckpt --base")
    assert train.endswith("--base f.yaml outputs/studio/cats/recipe.yaml -t --no-test --name cats model.params.a=1")


def test_recipe_values_are_those_of_the_fields_alone() -> None:
    urls = {"data": {"params": {"training_urls": "outputs/studio/cats/shards/*.tar"}}}
    assert recipe_values(RECIPE) == urls
    full = replace(RECIPE, batch=2, steps=9, minutes=1500.5, rate=1e-5, prompts=("a", "b"), preview_steps=3)
    assert recipe_values(full) == {
        "model": {"base_learning_rate": 1e-5},
        "data": {"params": {**urls["data"]["params"], "batch_size": 2}},
        "lightning": {
            "trainer": {"max_steps": 9, "max_time": "01:01:00:30"},
            "previews": {"prompts": ["a", "b"], "every_n_train_steps": 3, "config": "demo_tiny_release.yaml"},
        },
    }


@pytest.mark.parametrize("words", [
    preencode_words(replace(RECIPE, images=AWKWARD)),
    hack_words(replace(RECIPE, release=AWKWARD)),
    resume_words(AWKWARD),
    plan_words(replace(RECIPE, base=AWKWARD), 8),
    merge_words(Path(AWKWARD), AWKWARD, AWKWARD, "", "", False, 1),
    lora_words(AWKWARD, AWKWARD, AWKWARD, 0, False),
])  # fmt: skip
def test_a_path_is_one_word_that_is_no_option(words: tuple[str, ...]) -> None:
    own = [word for word in words if "touch" in word]
    assert own and all(word.startswith("./-it's") for word in own)
    assert shlex.split(str(Step("", words))) == ["python", *words]  # a shell reads the same words


def test_option_with_a_value_that_begins_with_a_dash_is_one_word() -> None:
    assert option("--config", "-x") == ("--config=-x",)
    assert option("--rank", 4) == ("--rank", "4")
    assert option("--rank", 0) == option("--config", "") == option("--half", False) == ()
    assert option("--half", True) == ("--half",)
    assert path_word("a/-b") == "a/-b"


def test_sample_words_keep_prompts_that_begin_with_a_dash() -> None:
    plain = SampleSettings(("a cat", "a dog"), 1, 2, 25, 3.0, "ddim")
    words = sample_words("r.ckpt", "", "", plain, Path("out"))
    assert words[3:6] == ("--prompt", "a cat", "a dog")
    words = sample_words("r.ckpt", "", "v", replace(plain, prompts=("-x", "b"), scale=-1.0), Path("out"))
    assert words[3:7] == ("--parameterization", "v", "--prompt=-x", "--prompt=b")
    assert "--scale=-1" in words


def test_merge_words_give_a_config_for_a_folder_alone() -> None:
    run = Path("logs/a")
    assert merge_words(run, "r", "out.ckpt", "c.yaml", "ema", True, 0.5)[-5:] == (
        "--weights", "ema", "--half", "--strength", "0.5",
    )  # fmt: skip
    assert "c.yaml" not in merge_words(run, "r", "out.ckpt", "c.yaml", "", False, 1)
    assert merge_words(run, "r", "out/", "c.yaml", "", False, 1)[-4:] == ("--out", "out/", "--config", "c.yaml")


def test_evaluate_words_name_each_set() -> None:
    words = evaluate_words("a", "b", "", "", ["x=1.tar", "y=2.tar"], Path("out"))
    assert words[5:] == ("--set", "x=1.tar", "--set", "y=2.tar", "--out", "out")


@pytest.mark.parametrize("name", ["", "../x", "-x", ".x", "a b", "a\n", "x" * 81, "é"])
def test_a_run_has_a_plain_name(name: str) -> None:
    with pytest.raises(UserError, match="name of the run"):
        replace(RECIPE, name=name)


def test_train_words_elsewhere_name_the_script_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train_words(RECIPE)[0] == str(ROOT / "main.py")


def test_shown_commands_can_be_pasted() -> None:
    steps = [Step("First", ("-c", "print('a b')")), Step("Second", ("-c", "print(2)"))]
    text = shown(steps).replace("python ", f"{shlex.quote(sys.executable)} ")
    assert os.popen(text).read() == "a b\n2\n"


def test_shown_titles_are_comments_of_one_line() -> None:
    steps = [Step("Sample from a\necho run; echo .ckpt", ("-c", "print(1)"))] * 2
    assert [line[0] for line in shown(steps).splitlines() if line] == ["#", "p", "#", "p"]


TOOL_WORDS = [
    inspect_words(AWKWARD, 64, Path("out.json")),
    plan_words(replace(RECIPE, overrides=("model.params.a=1",), size=64), 8, 16),
    preencode_words(replace(RECIPE, images=AWKWARD, release=AWKWARD, predicts="v", size=64, flip=True, overwrite=True)),
    hack_words(replace(RECIPE, predicts="v")),
    hack_words(replace(RECIPE, is_family=True)),
    merge_words(Path(AWKWARD), AWKWARD, f"{AWKWARD}/", "-c.yaml", "ema", True, 0.5),
    sample_words(AWKWARD, "-c.yaml", "eps", SampleSettings(("-x", "b"), 1, 2, 3, -1.5, "plms"), Path("out")),
    evaluate_words(AWKWARD, AWKWARD, "", "", ["-x=1.tar"], Path("out")),
    lora_words(AWKWARD, AWKWARD, f"{AWKWARD}.safetensors", 4, True),
    report_words(Path(AWKWARD)),
]


@pytest.mark.parametrize("words", TOOL_WORDS, ids=lambda words: Path(words[0]).stem)
def test_each_tool_takes_its_words(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", list(words))
    options = vars(runpy.run_path(str(ROOT / words[0]))["parse_arguments"]())
    values = [part for value in options.values() for part in (value if isinstance(value, list) else [value])]
    given = any("touch" in word for word in words)
    assert any(AWKWARD in str(value) for value in values) == given


def test_main_takes_its_words() -> None:
    recipe = replace(RECIPE, tier="lean.yaml", gpu=True, overrides=("model.params.a=1",))
    options = parse_arguments(train_words(recipe)[1:])
    assert options.base == ["demo_tiny.yaml", "lean.yaml", "outputs/studio/cats/recipe.yaml"]
    assert (options.name, options.train, options.no_test, options.resume) == (
        "cats", True, True, "outputs/studio/cats/start.ckpt",
    )  # fmt: skip
    assert options.overrides == ["model.params.a=1"]
    assert parse_arguments(resume_words("logs/a")[1:]).resume == "logs/a"
