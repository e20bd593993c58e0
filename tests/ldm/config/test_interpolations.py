"""Interpolations in configs: what may be in them, and that they cannot grow without bound."""

import pytest
from omegaconf import OmegaConf

from ldm.config.interpolations import typed_paths
from ldm.config.load import load_config, plain
from ldm.util import UserError


def load(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return plain(load_config([path]))


def doubling(lines, first, value):
    return f"model:\n x0: {first}\n" + "".join(f" x{i}: {value.format(i - 1)}\n" for i in range(1, lines))


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
    with pytest.raises(UserError, match="expand to too many values"):
        load(tmp_path, text)


def test_references_are_replaced(tmp_path):
    text = "model: {size: 8, a: '${.size}', b: ['${model.size}', 'x'], c: '${model.b[1]}-${.d.e}', d: {e: 1}}"
    model = load(tmp_path, text)["model"]
    assert (model["a"], model["b"], model["c"]) == (8, [8, "x"], "x-1")
    assert load(tmp_path, doubling(8, "ab", "'${{.x{0}}}${{.x{0}}}'"))["model"]["x7"] == "ab" * 2**7


@pytest.mark.parametrize(
    "value",
    [
        "'${oc.env:HOME}'",
        "'a/${oc.env:HOME,none}'",
        "'${ oc.env:HOME }'",
        "'${oc.decode:${oc.env:HOME}}'",
        "'${oc.create:{a: 1}}'",
        "'${oc.select:model.a}'",
        "'${oc.dict.values:model}'",
        "'${oc.deprecated:model.a}'",
        "'${mine:x}'",
        "'${model.${.a}}'",
        "'\\${oc.env:HOME}'",
        "['${oc.env:HOME}']",
    ],
)
def test_check_interpolations_asks_for_trust_for_anything_but_references(tmp_path, value):
    with pytest.raises(UserError, match=r"c\.yaml: .*give --trust-config") as caught:
        load(tmp_path, f"model: {{a: b, b: {value}}}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "model: {x: {1: a, '1': '${oc.env:HOME}'}}",
        "model: {x: {'1': a, 1: '${oc.env:HOME}'}}",
        "model: {x: {true: a, 'True': '${oc.env:HOME}'}}",
    ],
)
def test_check_interpolations_looks_at_every_value(tmp_path, text):
    with pytest.raises(
        UserError,
        match=r"c\.yaml: .*('model.x' has the same key as text and as a number|Conflicting integer and string keys)",
    ):
        load(tmp_path, text)


def test_an_interpolation_that_is_made_of_parts_is_refused_or_stays_as_it_is_written(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {a: $, b: '${model.a}{oc.env:HOME}'}")
    with pytest.raises(UserError, match=r"forms an interpolation .*give --trust-config"):
        load_config([path])
    config = load_config([path], trusted=True)
    assert OmegaConf.to_container(config)["model"]["b"] == "${model.a}{oc.env:HOME}"
    assert plain(config)["model"]["b"] == "${oc.env:HOME}"


def test_typed_interpolations_are_the_persons_own(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_TEST_PLACE", "/data")
    path = tmp_path / "c.yaml"
    path.write_text("model: {params: {x: 1, y: '${model.params.x}/z'}}")
    config = load_config([path], ["model.params.x=${oc.env:LDM_TEST_PLACE}"])
    assert plain(config.model.params) == {"x": "/data", "y": "/data/z"}
    with pytest.raises(UserError, match="give --trust-config"):  # at another place than where it was typed
        path.write_text("model: {params: {x: 1, y: '${oc.env:LDM_TEST_PLACE}'}}")
        load_config([path], ["model.params.x=${oc.env:LDM_TEST_PLACE}"])


def test_typed_paths_leaves_out_what_refers_to_a_file():
    typed = [{"model": {"a": "x", "b": "${model.a}", "c": ["${oc.decode:${oc.env:HOME}}", 1]}}, {"data": {"z": None}}]
    typed += [{"data": {"u": "${ model.a }", "v": "x${oc.select:model.a}", "w": "${model.${oc.env:A,a}}"}}]
    assert typed_paths(typed) == {("model", "a"), ("model", "c", "0"), ("model", "c", "1"), ("data", "z")}
