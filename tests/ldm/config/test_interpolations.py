"""Interpolations in configs: what may be in them, and that they cannot grow without bound."""

import pytest

from ldm.config.load import load_config, plain
from ldm.util import UserError


def load(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return plain(load_config([path]))


def doubling(lines, first, value):
    return f"model:\n x0: {first}\n" + "".join(f" x{i}: {value.format(i - 1)}\n" for i in range(1, lines))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        doubling(60, "lol", "'${{.x{0}}}${{.x{0}}}'"),
        doubling(60, "lol", "'${{model.x{0}}}${{model[x{0}]}}'"),
        doubling(60, "[lol]", "['${{model.x{0}}}', '${{model.x{0}}}']"),
        doubling(60, "{a: lol}", "{{a: '${{..x{0}}}', b: '${{..x{0}}}'}}"),
    ],
    ids=["strings", "brackets", "lists", "dicts"],
)
def test_what_doubles_line_by_line_is_refused_at_once(tmp_path, text):
    with pytest.raises(UserError, match="stand for too much"):
        load(tmp_path, text)


def test_a_few_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDS", "/data")
    text = "model: {size: 8, a: '${.size}', b: ['${model.size}', '${oc.env:SHARDS}/x'], "
    text += "c: '${model.b[1]}-${.d.e}', d: {e: 1}}"
    model = load(tmp_path, text)["model"]
    assert (model["a"], model["b"], model["c"]) == (8, [8, "/data/x"], "/data/x-1")
    assert load(tmp_path, doubling(8, "ab", "'${{.x{0}}}${{.x{0}}}'"))["model"]["x7"] == "ab" * 2**7


@pytest.mark.parametrize("value", ["'${oc.select:model.a}'", "'${oc.dict.values:model}'", "'${model.${.a}}'"])
def test_others_ask_for_trust(tmp_path, value):
    with pytest.raises(UserError, match="give --trust-config"):
        load(tmp_path, f"model: {{a: b, b: {value}}}")
