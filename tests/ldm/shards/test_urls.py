import pytest

from ldm.shards.urls import expand_urls, is_stream
from ldm.util import UserError


@pytest.fixture
def folder(tmp_path):
    for name in ("a-000.tar", "a-001.tar", "b.tar", "note.txt", ".a-002.77.tmp.tar"):
        (tmp_path / name).touch()
    return tmp_path


def test_every_way_of_naming_shards(folder):
    first, second = str(folder / "a-000.tar"), str(folder / "a-001.tar")
    both = [first, second]
    assert expand_urls(first) == [first]
    assert expand_urls(folder / "a-000.tar") == [first]
    assert expand_urls(f"file:{first}") == expand_urls(f"file://{first}") == [first]
    assert expand_urls(f"{folder}/a-{{000..001}}.tar") == both
    assert expand_urls(f"{folder}/a-*.tar") == both
    assert expand_urls([second, first]) == [second, first]
    assert expand_urls(f"{second}::{first}") == [second, first]
    assert expand_urls(str(folder)) == [*both, str(folder / "b.tar")]


def test_streams_stay_as_they_are():
    assert expand_urls("pipe:cat x-{0..1}.tar") == ["pipe:cat x-0.tar", "pipe:cat x-1.tar"]
    assert [is_stream(url) for url in ("pipe:cat x", "https://a/b.tar", "/a/b.tar", "b.tar")] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("urls", ["none-*.tar", "empty/", [], "a-{0..", ["x.tar", "x.tar"]])
def test_what_names_nothing_or_too_much_is_an_error(tmp_path, monkeypatch, urls):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        expand_urls(urls)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "pattern", ["{0..99999999999}.tar", "{a,b}" * 40 + ".tar", "{" + "{a,b}" * 40 + ",c}.tar", "{1" + "0" * 20 + "..1}"]
)
def test_patterns_that_stand_for_too_much_are_refused_at_once(pattern):
    with pytest.raises(UserError, match="too many names"):
        expand_urls(pattern)


def test_a_pattern_nested_too_deeply_is_refused():
    with pytest.raises(UserError, match="recursion"):
        expand_urls("{" * 3000 + "}" * 3000)
