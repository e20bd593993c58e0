"""Configs that are broken, absurd, or would run what they name."""

from __future__ import annotations

from pathlib import Path

from tests.hostile.damage import Corpus, damaged, mistaken


def configs(marker: Path) -> Corpus:
    yield from mistaken()
    good = b"model:\n  base_learning_rate: 1.0e-4\n  target: torch.nn.Linear\n"
    good += b"  params: &p {in_features: 2, out_features: 3}\n"
    good += b"data:\n  params: {x: *p, y: '${model.params.in_features}'}\n"
    yield from damaged(good, "yaml", 40)
    touch = f"touch {marker}"
    for number, text in enumerate(
        (
            f"model: !!python/object/apply:os.system ['{touch}']",
            f"model: {{x: !!python/object/new:os.system ['{touch}']}}",
            "model: {x: !!python/name:os.system }",
            "model: {x: !!python/module:os }",
            f"model: {{target: os.system, params: {{command: '{touch}'}}}}",
            f"model: {{target: subprocess.Popen, params: {{args: '{touch}', shell: true}}}}",
            f"data: {{params: {{training_urls: 'pipe:{touch}'}}}}",
            "model: {x: !!int y}",
            "model: {x: !!float y}",
            "model: {x: !!bool y}",
            "model: {x: !!timestamp y}",
            "model: {x: !!binary '*'}",
            "model: {x: !!set {a, b}}",
            "model: {x: !!omap [a: 1]}",
            "model: {x: =}",
            "model: {x: " + "9" * 5000 + "}",
            "model: {x: 1e999}",
            "model: {? [a] : b}",
            "model: {<<: 3}",
            "model: {<<: *x}",
            "model: &a {x: *a}",
            "model: {x: '${model.x}'}",
            "model: {x: '${'}",
            "model: {x: '${x:}'}",
            "model: {x: '${..}'}",
            "model: {x: '${oc.env:NONE_OF_THIS_NAME}'}",
            "model: " + "[" * 3000 + "]" * 3000,
            "model: " + "{a: " * 3000 + "}" * 3000,
            "model: {x: '" + "${a" * 3000 + "}" * 3000 + "'}",
            "? a\n? b\n",
            "--- {}\n--- {}\n",
            "%YAML 9.9\n---\nmodel: {}",
            "1: 2",
            "null: {}",
            "model: 3",
            "data: []",
            "model: {target: 3}",
            "model: {target: [a]}",
            "model: {target: ..x}",
        )
    ):
        yield f"text-{number}", text.encode()
    yield (
        "aliases",
        ("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))).encode(),
    )
    yield (
        "merges",
        ("a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))).encode(),
    )
    strings = "".join(f"  x{i}: '${{.x{i - 1}}}${{.x{i - 1}}}'\n" for i in range(1, 60))
    yield "interpolations", ("model:\n  x0: lol\n" + strings).encode()
    yield "chain", ("model:\n" + "".join(f"  x{i}: ${{.x{i + 1}}}\n" for i in range(3000)) + "  x3000: 1\n").encode()
    yield "large", b"model: {x: " + b"a" * (1 << 21) + b"}"
    yield "braces", b"data: {params: {training_urls: 'http:{0..99999999999}'}}"
