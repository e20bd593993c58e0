"""A set on a server trains as the same set in a folder: the same batches in the same order, also after a resume."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.data.stream import ShardStream
from ldm.remote import retries
from ldm.shards import kept_tables
from ldm.shards.index import INDEX, write_index
from ldm.shards.reader import ShardDataset
from ldm.shards.writer import ShardWriter
from ldm.util import UserError
from tests.ldm.set_server import SetServer, serving_with_tables
from tests.ldm.shard_files import sample_members, write_set

PATTERN = "{000..003}.tar"


def write_indexed(folder: Path, samples: int = 40, per_shard: int = 10) -> None:
    """Write a set with its index, as tools/preencode.py leaves it."""
    folder.mkdir()
    with ShardWriter(str(folder / "%03d.tar"), per_shard) as writer:
        for number in range(samples):
            members = [(name.partition("."), data) for name, data in sample_members(number)]
            writer.write(f"{number:06d}", {extension: data for (_, _, extension), data in members})
    write_set(folder / "other", 2)
    (folder / "other/null.t5.npy").rename(folder / "null.t5.npy")
    write_index(folder, {"format": 2, "out": "%03d.tar", "complete": True, "shards": writer.shards})


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """Keep copies in a folder of the test, and wait little."""
    monkeypatch.setenv("LATENT_FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retries, "PAUSES", (0.01, 0.01, 0.01))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve a set of 40 samples in four shards, with the tables of its members."""
    write_indexed(tmp_path / "set")
    with serving_with_tables(tmp_path / "set", monkeypatch) as server:
        yield server


def opened(urls: str | list, **options) -> WebDataNpyModuleFromConfig:
    data = WebDataNpyModuleFromConfig(4, urls, seed=3, null_cond_dropout=0.3, **options)
    data.setup("fit")
    return data


def batches(data: WebDataNpyModuleFromConfig, epoch: int = 0, state: dict | None = None) -> list:
    loader = data.train_dataloader()
    if state is not None:
        loader.load_state_dict(state)
    loader.batch_sampler.set_epoch(epoch)
    return [(batch["__key__"], batch["txt"], batch["f8"].numpy(), batch["t5"].numpy()) for batch in loader]


def are_equal(ours: list, theirs: list) -> bool:
    return len(ours) == len(theirs) and all(
        a[:2] == b[:2] and np.array_equal(a[2], b[2]) and np.array_equal(a[3], b[3])
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_local_set(server: SetServer, num_workers):
    local = opened(str(server.folder / PATTERN))
    remote = opened(f"{server.url}/{PATTERN}", num_workers=num_workers)
    for epoch in (0, 1):
        assert are_equal(batches(remote, epoch), batches(local, epoch))
    assert not copies(server)  # parts alone


def copies(server: SetServer) -> list[Path]:
    """Return the copies of whole shards in the cache."""
    return list((server.folder.parent / "cache").glob("*.tar"))


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_resumed_run_continues_within_the_epoch(server: SetServer, has_ranges):
    server.has_ranges = has_ranges
    local = opened(str(server.folder / PATTERN)).train_dataloader()
    before = [next(rest)["__key__"] for rest in [iter(local)] for _ in range(4)]
    state = local.state_dict()
    assert state["batch"] == 4
    rest = batches(opened(f"{server.url}/{PATTERN}"), state=state)
    whole = batches(opened(str(server.folder / PATTERN)))
    assert before == [batch[0] for batch in whole[:4]]
    assert are_equal(rest, whole[4:])
    assert len(copies(server)) == (0 if has_ranges else 4)


def test_passing_faults_change_nothing(server: SetServer):
    local = batches(opened(str(server.folder / PATTERN)))
    server.delay = 0.02
    server.fault = lambda name, number: {1: 503, 3: 100.0, 4: 429, 6: 0.0}.get(number % 8)
    assert are_equal(batches(opened(f"{server.url}/{PATTERN}")), local)
    assert server.requests["000.tar"] > 12


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (503, r"HTTP 503 \(Service Unavailable\), 4 times; continue when the server is back"),
        (5.0, r"the connection was cut, 4 times"),
        (403, r"HTTP 403 \(Forbidden\); check the rights, or renew the signature"),
        (404, r"HTTP 404 \(Not Found\); check the URL"),
        (418, r"cannot be read: HTTP 418"),
    ],
)
def test_a_lasting_fault_is_one_line_without_secrets(server: SetServer, fault, message, num_workers):
    data = opened(f"http://me:my-password@{server.url[7:]}/{PATTERN}?token=abcdefgh", num_workers=num_workers)
    assert set(server.queries) == {"token=abcdefgh"}
    server.fault = lambda name, number: fault
    before = sum(server.requests.values())
    with pytest.raises(UserError, match=message) as caught:
        batches(data)
    assert str(caught.value).startswith("http://<hidden>@127.0.0.1") and "\n" not in str(caught.value)
    assert "abcdefgh" not in str(caught.value) and "my-password" not in str(caught.value)
    if not num_workers:
        assert sum(server.requests.values()) - before == (4 if fault in (503, 5.0) else 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_changes_in_use_is_refused(server: SetServer, num_workers):
    data = opened(f"{server.url}/{PATTERN}", num_workers=num_workers)
    iterator = iter(data.train_dataloader())
    next(iterator)
    for path in server.folder.glob("*.tar"):
        changed = bytearray(path.read_bytes())
        changed[700] ^= 1  # in an array, where neither size nor headers tell
        path.write_bytes(changed)
    with pytest.raises(UserError, match=r"00\d\.tar: was replaced or changed while it was in use") as caught:
        list(iterator)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"000\.tar: has \d+ bytes, but \d+ in http.*index\.json"):
        (server.folder / "000.tar").write_bytes(b"0" * 5120)
        opened(f"{server.url}/{PATTERN}")


def test_a_set_without_tables_is_read_whole_once(server: SetServer):
    (server.folder / kept_tables.TABLES).unlink()
    local = batches(opened(str(server.folder / PATTERN)))
    assert are_equal(batches(opened(f"{server.url}/{PATTERN}")), local)
    assert len(copies(server)) == 4
    for copy in copies(server):
        copy.unlink()
    assert are_equal(batches(opened(f"{server.url}/{PATTERN}")), local)
    assert not copies(server)


@pytest.mark.parametrize("change", ["order", "key", "last"])
def test_tables_that_disagree_with_the_tars_are_not_used(server: SetServer, tmp_path, monkeypatch, change):
    """Serve the tables of a set of the same size whose samples have other places or names."""
    numbers = list(range(40))
    names = {number: f"{number:06d}" for number in numbers}
    if change == "order":
        numbers.reverse()
    elif change == "key":
        names[20] = "00002x"
    else:
        numbers[38:] = [39, 38]
    other = tmp_path / "changed"
    with ShardWriter(str(other / "%03d.tar"), 10) as writer:
        for number in numbers:
            members = [(name.partition("."), data) for name, data in sample_members(number)]
            writer.write(names[number], {extension: data for (_, _, extension), data in members})
    monkeypatch.setattr(kept_tables, "LEAST_SAMPLES", 1)
    kept_tables.keep_tables(sorted(other.glob("*.tar")))
    local = batches(opened(str(server.folder / PATTERN)))
    shutil.copy(other / kept_tables.TABLES, server.folder / kept_tables.TABLES)
    if change == "last":  # found where the members are read
        with pytest.raises(UserError, match=r"003\.tar: .* is not as http.*\.members\.safetensors, or .* describes"):
            batches(opened(f"{server.url}/{PATTERN}"))
    else:
        assert are_equal(batches(opened(f"{server.url}/{PATTERN}")), local)


def test_a_copy_that_is_not_of_the_index_is_refused(server: SetServer):
    server.has_ranges = False
    path = server.folder / "002.tar"
    changed = bytearray(path.read_bytes())
    changed[700] ^= 1
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"002\.tar: was changed: its SHA-256 is not that of its index"):
        batches(opened(f"{server.url}/{PATTERN}"))


def test_a_set_without_an_index_is_streamed(server: SetServer, caplog):
    (server.folder / INDEX).unlink()
    urls = f"{server.url}/{PATTERN}"
    with caplog.at_level(logging.WARNING):
        data = opened(urls, null_cond_path=str(server.folder / "null.t5.npy"))
    assert f"{server.url}: has no index.json; the set is streamed" in caplog.text
    assert isinstance(data.datasets["training"], ShardStream)
    with pytest.raises(UserError, match="cannot be read in any order, which is needed here"):
        opened(str(server.folder / PATTERN), prior_urls=urls)


def test_weights_and_further_sets_work_as_with_local_ones(server: SetServer):
    def weighted(folder: str) -> list:
        weighted = [{"urls": f"{folder}/000.tar", "weight": 2.5}, {"urls": f"{folder}/00{{1,3}}.tar"}]
        return [*weighted, f"{server.folder}/002.tar"]  # a local one among them

    ours, theirs = (
        opened(weighted(folder), prior_urls=f"{folder}/003.tar", val_urls=f"{folder}/002.tar")
        for folder in (server.url, str(server.folder))
    )
    assert are_equal(batches(ours), batches(theirs))
    assert len(list(ours.val_dataloader())) == 3


def test_what_a_server_cannot_give_in_any_order_is_streamed(server: SetServer, monkeypatch, caplog):
    null = str(server.folder / "null.t5.npy")
    monkeypatch.setenv("LATENT_FINETUNE_CACHE_GB", "0.00005")
    assert isinstance(opened(f"{server.url}/{PATTERN}").datasets["training"], ShardDataset)
    server.has_ranges = False
    data = opened(f"{server.url}/{PATTERN}", null_cond_path=null)
    assert isinstance(data.datasets["training"], ShardStream)
    assert "no Range" in caplog.text and "set LATENT_FINETUNE_CACHE_GB above that" in caplog.text
    (server.folder / INDEX).write_text("<html>every name has this page</html>")
    data = opened(f"{server.url}/{PATTERN}", null_cond_path=null)
    assert isinstance(data.datasets["training"], ShardStream)
    assert "its index.json is not the index of a set" in caplog.text
