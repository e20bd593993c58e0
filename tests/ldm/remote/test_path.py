from pathlib import Path

from ldm.remote.path import RemotePath, as_path, is_remote


def test_paths_keep_the_query_and_hide_the_secrets():
    path = RemotePath("https://me:my-password@host/a/my%20set/000.tar?sig=abcdefghij&x=1")
    assert path.name == "000.tar" and path.parent.name == "my set"
    index = path.parent / "index [1].json"
    assert index.url == "https://me:my-password@host/a/my%20set/index%20%5B1%5D.json?sig=abcdefghij&x=1"
    assert index.name == "index [1].json" and index.parent == path.parent
    assert str(path) == "https://<hidden>@host/a/my%20set/000.tar?sig=<hidden>&x=1"
    assert "my-password" not in repr(path) and "abcdefghij" not in repr(path)
    assert path.digest == RemotePath("https://host/a/my%20set/000.tar?sig=other").digest != index.digest


def test_as_path_tells_servers_from_local_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("http://host/a.tar", "https://host/a.tar", "s3://bucket/a.tar", "gs://bucket/a.tar"):
        assert is_remote(url) and as_path(url) == RemotePath(url) == as_path(as_path(url))
    for name in ("a.tar", "pipe:cat a.tar", "ftp://host/a.tar", "https:"):
        assert not is_remote(name) and as_path(name) == Path(name)
    Path("http:/host").mkdir(parents=True)
    Path("http:/host/a.tar").touch()
    assert as_path("http://host/a.tar") == Path("http:/host/a.tar")
