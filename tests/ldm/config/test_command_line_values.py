"""Values of a command line reach their key as they were typed, or are refused."""

from __future__ import annotations

import pytest

from ldm.config.command_line_values import parse_value
from ldm.config.load import load_config
from ldm.util import UserError


@pytest.mark.parametrize(
    "text",
    [
        "fruit [2]/a.tar", "[2]/a.tar", "[a] and [b]", "*.tar", "{000..009}.tar", "{a,b}", "{epoch:06}-{step:09}",
        "{step}", "on", "off", "yes", "no", "y", "010", "1_000", "0x1F", "12:30:00", "2026-01-01", "a: b", "a #b",
        "#a", "a, b", "it's", "&a b", "!a b", "%a", "@a", "`a`", "| a", "- a", "? a", "~/a", " a ", "1e", "e5", "a=b",
        "é", "0,18215", "None",
    ],
)  # fmt: skip
def test_parse_value_leaves_text_as_it_is(text: str) -> None:
    assert parse_value(text) == text
    if not text.startswith(" "):
        assert load_config([], [f"data.params.x={text}"]).data.params.x == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E5", 1e5), ("-1.5", -1.5), (".5", 0.5), ("6.666e-08", 6.666e-08), ("7", 7), ("+7", 7),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("[1, a]", [1, "a"]), ("[]", []),
        ("{a: 1}", {"a": 1}), ("{}", {}), ("'010'", "010"), ('"a: b"', "a: b"), ("[1e-5]", [1e-5]),
        ("[on, off, yes, n]", ["on", "off", "yes", "n"]), ("{on: off}", {"on": "off"}), ("'on'", "on"),
        ("[010, 1_000, 0x1F, 12:30:00, =, <<]", ["010", "1_000", "0x1F", "12:30:00", "=", "<<"]),
        ("{a: [yes, 1, true, null, 1.5, ~, .inf]}", {"a": ["yes", 1, True, None, 1.5, None, float("inf")]}),
        ("[{a: 1}, {b: -1e3}]", [{"a": 1}, {"b": -1e3}]), ("{a: null}", {"a": None}), ("['{a,b}']", ["{a,b}"]),
    ],
)  # fmt: skip
def test_parse_value_reads_numbers_lists_and_mappings(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["[a", "{a", "'a' b'", "[a, 'b]", "[!!python/name:os.system x]", "[&a b", "[{a,b}]", "[{a: }]"]
)
def test_parse_value_refuses_what_it_cannot_read(text: str) -> None:
    with pytest.raises(UserError, match=r"x=.*not valid YAML"):
        load_config([], [f"data.params.x={text}"])
