"""Tests that a text in a config is recognised as a command, a URL or local files."""

import pytest

from ldm.config.external_access import COMMAND, NETWORK, UNCLEAR, external_access


@pytest.mark.parametrize(
    "text",
    [
        "pipe:ls",
        "pipe: ls",
        "PIPE:ls",
        " pipe:ls",
        "p\nipe:ls",
        "p\x00ipe:ls",
        "\ufeffpipe:ls",
        "\uff50ipe:ls",  # a wide p
        r"\pipe:ls",
        "'pipe:ls'",
        "file:pipe:ls",
        "file://pipe:ls",
        "a.tar::pipe:ls",
        "a.tar::Pipe:ls",
        "{p,q}ipe:ls",
        "{pi,x}{pe:ls,y}",
        "{a,{p,q}ipe:ls}",
        "a tar, then pipe:ls",
        "!ls",
        "a.tar::!ls",
        "|ls",
        "pipe:",
        "pipe:{",
    ],
)
def test_external_access_knows_a_command_however_it_is_written(text):
    assert external_access(text) == COMMAND


@pytest.mark.parametrize(
    "text",
    [
        "http://host/a.tar",
        "HTTPS://host/a.tar",
        "http:host/a.tar",
        "s3://bucket/a",
        "s3:bucket/a",
        "gs://b",
        "gs:b",
        "hf:b",
        "ftp://h/a",
        "sftp://h/a",
        "memory://a",
        "unheard-of:a",
        "a.tar::http://h/b",
        "simplecache::s3://b/a",
        "s{3,4}:b",
        "htt{p,q}:h",
        "file:http://h",
        "text before http://h",
    ],
)
def test_external_access_knows_a_url(text):
    assert external_access(text) == NETWORK


@pytest.mark.parametrize("text", ["{p,qipe:ls", "{0..99999999}x:ls", "a{b{c:d", "x{0..2000}:b"])
def test_external_access_takes_what_it_cannot_read_for_no_local_file(text):
    assert external_access(text) == UNCLEAR


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.tar",
        "-",
        "shards/s-{000000..000009}.tar",
        "file:shards/s-{0..3}.tar::t-{0..3}.tar",
        "file:///data/a.tar",
        "{epoch:06}-{step:09}",
        "step={step:05}-{val/loss:.2f}",
        "cuda:0",
        "00:12:00:00",
        "photo: a cat",
        "a bagpipe: music",
        "C:\\data\\a.tar",
        "2026-11-26 12:30:00",
        "(cat:1.2)",
        "torch.nn.Identity",
        "${oc.env:HOME}",  # left to ldm.config.interpolations
    ],
)
def test_external_access_leaves_local_files_and_prose_alone(text):
    assert external_access(text) is None


def test_external_access_expands_little():
    for text in ("{0..999999}" * 5 + ":x", "{" * 5000 + ":", "{a,b}" * 200 + ":x", ":" * 500_000):
        external_access(text)
