"""tools/plan_memory.py: a table, an answer for a card, JSON; and its refusals."""

from __future__ import annotations

import json


def test_a_step_by_category_as_a_table_and_as_json(command) -> None:
    shown = command(
        "tools/plan_memory.py", "--base", "demo_tiny.yaml", "--batch", 2, "lightning.trainer.precision=bf16"
    )
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()[1:]]
    categories = ["weights", "gradients", "optimizer", "activations", "temporaries", "peak"]
    assert [words[0] for words in lines[:6]] == categories and all(words[2] == "GiB" for words in lines[:6])
    assert "of a card" in shown.stdout and "0.6 GiB for context and workspaces and 3 % for gaps" in shown.stdout

    plain = command("tools/plan_memory.py", "--json", "--base", "demo_tiny.yaml", "--batch", 2)
    figures = json.loads(plain.stdout)
    assert list(figures) == [*categories, "card"]
    assert sum(figures[name] for name in categories[:-1]) == figures["peak"] < figures["card"]


def test_what_fits_a_card(command) -> None:
    line = ("--base", "demo_tiny.yaml", "--card", 0.8, "--json")
    answer = json.loads(command("tools/plan_memory.py", *line).stdout)
    found = {tier["tier"]: tier["pictures"] for tier in answer["tiers"]}
    assert answer["use"] == "as given" and {"as given", "minimal.yaml"} <= found.keys()
    assert 0 < found["as given"] < found["minimal.yaml"]


def test_mistakes_are_one_line(command) -> None:
    for words, message in (
        (["--base", "nothing.yaml"], "config 'nothing.yaml' not found"),
        (["--base", "demo_tiny.yaml", "--card", 0], "--card 0.0: give the card's memory in GB"),
        (["--base", "demo_tiny.yaml", "--card", 8, "--batch", 1], "--card finds the batch; leave out --batch"),
    ):
        done = command("tools/plan_memory.py", *words)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
