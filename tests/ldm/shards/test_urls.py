import pytest

from ldm.config.braces import expand_braces
from ldm.shards.urls import expand_urls, is_stream, names_all_there
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


@pytest.mark.parametrize(
    "urls", ["none-*.tar", "empty/", [], "a-{0..", ["x.tar", "x.tar"], None, True, 5, [None], {"a": "b"}, [["a.tar"]]]
)
def test_what_names_nothing_or_too_much_is_an_error(tmp_path, monkeypatch, urls):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        expand_urls(urls)


@pytest.mark.parametrize(
    "pattern", ["{0..99999999999}.tar", "{a,b}" * 40 + ".tar", "{" + "{a,b}" * 40 + ",c}.tar", "{1" + "0" * 20 + "..1}"]
)
def test_patterns_that_stand_for_too_much_are_refused_at_once(pattern):
    with pytest.raises(UserError, match="too many names"):
        expand_urls(pattern)


@pytest.mark.slow
def test_a_pattern_nested_too_deeply_is_refused():
    with pytest.raises(UserError, match="recursion"):
        expand_urls("{" * 3000 + "}" * 3000)


@pytest.mark.parametrize(
    "folder",
    ["fruit [2]", "fruit {2}", "fruit {a,b}", "fruit*", "a::b", "fruit?", "~x", "f #1: [y]", "co:lon", "file:x"],
)
def test_expand_urls_takes_what_exists_literally(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    for name in (folder, "fruit 2", "fruit a", "fruits"):
        (tmp_path / name).mkdir(exist_ok=True)
        for shard in ("000.tar", "001.tar"):
            (tmp_path / name / shard).touch()
    both = [f"{folder}/000.tar", f"{folder}/001.tar"]
    assert expand_urls(f"{folder}/000.tar") == both[:1]
    for pattern in (folder, f"{folder}/*.tar", f"{folder}/{{000..001}}.tar", f"{folder}/00[01].tar"):
        assert expand_urls(pattern) == both
        assert expand_urls(f"{tmp_path}/{pattern}") == [f"{tmp_path}/{path}" for path in both]
    assert expand_urls(f"file:{tmp_path}/{folder}/*.tar") == [f"{tmp_path}/{path}" for path in both]
    assert not names_all_there(f"{folder}/000.tar") and not names_all_there(f"{folder}/002.tar")
    assert names_all_there(folder) and names_all_there(f"{folder}/*.tar")
    assert expand_urls(f"{folder}/002.tar") == [f"{folder}/002.tar"]  # which is not there, and is no pattern


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"shards\s-{0..1}.tar", [r"shards\s-0.tar", r"shards\s-1.tar"]),
        (r"C:\data\x.tar", [r"C:\data\x.tar"]),
        (r"a\{b\}{c\,d,e}", ["a{b}c,d", "a{b}e"]),
    ],
)
def test_expand_braces_keeps_backslashes_that_escape_nothing(pattern, names):
    assert list(expand_braces(pattern)) == names


def test_a_query_of_a_url_is_no_glob():
    url = "https://host/set/000.tar?signature=[a]*"
    assert not names_all_there(url) and not names_all_there([f"{url}::s3://bucket/0.tar?x=1"])
    assert expand_urls("https://host/{0..1}.tar?x=1") == ["https://host/0.tar?x=1", "https://host/1.tar?x=1"]
