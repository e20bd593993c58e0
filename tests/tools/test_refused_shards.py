"""Tests that every reader of pre-encoded shards refuses a damaged, unfinished or foreign set with the same line."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ldm.checkpoint import encoder_digests, save_state_dict
from ldm.config.load import build_model
from ldm.shards.index import INDEX, write_index
from ldm.shards.verify import file_sha256
from tests.conftest import ROOT
from tests.golden_data import fill_seeded
from tests.ldm.shard_files import write_set
from tests.training_runs import CONFIG, TEXT_TOWER, fixture_one_thread  # noqa: F401

WATCHED = "lightning.callbacks.forgetting"
WATCH = f"{WATCHED}.target=ldm.callbacks.forgetting.Forgetting {WATCHED}.params.every_n_train_steps=1 {WATCHED}.params"
TRAIN = "main.py -b tiny.yaml -t --no-test -l logs --max_steps 1 model.params.ckpt_path=tiny.safetensors"
RELEASE = "--ckpt tiny.safetensors --config release.yaml --device cpu"
PAIR = "--base tiny.safetensors --ckpt tiny.safetensors --timesteps 1 --device cpu --out out --set new=SHARDS"
READERS = {
    "training": f"{TRAIN} data.params.training_urls=SHARDS",
    "prior": f"{TRAIN} data.params.training_urls=good data.params.prior_urls=SHARDS",
    "watching": f"{TRAIN} data.params.training_urls=good {WATCH}.sets.new=SHARDS",
    "evaluate": f"tools/evaluate.py {PAIR} --config release.yaml",
    "evaluate, stored encodings": f"tools/evaluate.py {PAIR} --config tiny.yaml",
    "make_prior": f"tools/make_prior.py {RELEASE} --teacher 1 --out out/s.tar --shards SHARDS",
    "inspect_shards": "tools/inspect_shards.py --json found.json SHARDS",
    "inspect_shards, with a model": f"tools/inspect_shards.py {RELEASE} --sheet sheet.png SHARDS",
}
READS_ENCODINGS = ("evaluate, stored encodings", "make_prior")  # and compare the text tower with their release's
INSPECTIONS = [name for name in READERS if name.startswith("inspect")]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the tiny release, its config with a text encoder, and the config of its training."""
    folder = tmp_path_factory.mktemp("release")
    OmegaConf.save(OmegaConf.create(CONFIG), folder / "tiny.yaml")
    config = {"model": copy.deepcopy(CONFIG["model"])}
    config["model"]["params"] |= {"use_ema": False, "cond_stage_key": "txt", "cond_stage_config": TEXT_TOWER}
    OmegaConf.save(OmegaConf.create(config), folder / "release.yaml")
    save_state_dict(fill_seeded(build_model(OmegaConf.create(config))).state_dict(), folder / "tiny.safetensors")
    return folder


def index_of(folder: Path) -> dict:
    return json.loads((folder / INDEX).read_text())


@pytest.fixture
def here(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """Make a folder with the release and two equal sets of two shards, `good` and `bad`, made by the release."""
    from ldm.checkpoint import load_state_dict

    digests = encoder_digests(load_state_dict(release / "tiny.safetensors"))
    for path in release.iterdir():
        os.link(path, tmp_path / path.name)
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        write_set(tmp_path / name, 4, f8_shape=(8, 4, 4), t5_shape=(77, 8))
        paths = sorted((tmp_path / name).glob("*.tar"))
        shards = [{"name": p.name, "bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in paths]
        write_index(tmp_path / name, {"format": 2, "complete": True, "shards": shards, **digests})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # monkeypatch then removes the value that a run sets
    return tmp_path


@pytest.fixture
def read(here: Path, run_tool: Callable) -> Callable[[str, str], str | int | None]:
    """Return a function that runs a reader's command on shards, and returns None or the error line."""

    def call(reader: str, shards: str) -> str | int | None:
        script, *words = READERS[reader].replace("SHARDS", shards).split()
        return run_tool(ROOT / script, *words)

    return call


def files(folder: Path) -> set[Path]:
    """Return all files except the records of verified shards."""
    return {path for path in folder.rglob("*") if path.is_file() and path.name != ".verified.json"}


def unfinished(folder: Path) -> None:
    write_index(folder, {**index_of(folder), "complete": False, "shards": []})


def flipped_bit(folder: Path) -> None:
    data = bytearray((folder / "set-001.tar").read_bytes())
    data[700] ^= 1  # in the values of an array
    (folder / "set-001.tar").write_bytes(data)


def truncated(folder: Path) -> None:
    os.truncate(folder / "set-001.tar", 3000)


def missing(folder: Path) -> None:
    (folder / "set-001.tar").unlink()


def added(folder: Path) -> None:
    (folder / "set-001.tar").rename(folder / "old.tar")


UNFINISHED = (
    "bad/index.json: the set is unfinished, because writing it was interrupted; give the same command of "
    "tools/preencode.py again to resume it, or write the set again with --overwrite, by tools/preencode.py or "
    "tools/make_prior.py"
)
MISSING = "bad/set-001.tar: missing (1 of 2 shards in index.json); copy it again, name only existing shards"
DAMAGE = {
    "checksum": (flipped_bit, "bad", "bad/set-001.tar: was changed: its SHA-256 is "),
    "size": (truncated, "bad", "bad/set-001.tar: has 3000 bytes, but 20480 in bad/index.json; copy it again, or write"),
    "missing": (missing, "bad/*.tar", MISSING),
    "missing, named": (missing, "bad/set-{000..001}.tar", MISSING),
    "not in the index": (
        added,
        "bad",
        "bad/old.tar: not in bad/index.json; move it to a folder of its own, or write",
    ),
    "no such file": (missing, "bad/set-002.tar", "bad/set-002.tar: no such file"),
    "streamed": (missing, "pipe:false", "pipe:false: is a stream; give local shards, which can be read in any order"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_reader_refuses_damage_in_the_same_line(here: Path, read: Callable, damage: str) -> None:
    damage_set, shards, line = DAMAGE[damage]
    damage_set(here / "bad")
    before = files(here)
    errors = {}
    for reader in READERS:
        if damage == "streamed" and "main.py" in READERS[reader]:
            continue  # training accepts a `pipe:` from a trusted config
        error = read(reader, shards)
        assert isinstance(error, str) and error.startswith("error: "), reader
        errors[reader] = error.removeprefix("error: ").removeprefix("set 'new': ")
    assert len(set(errors.values())) == 1, errors
    assert errors["evaluate"].startswith(line) and "\n" not in errors["evaluate"]
    assert files(here) == before


@pytest.mark.parametrize("reader", READERS)
def test_an_unfinished_set_is_refused_but_can_be_inspected(
    here: Path, read: Callable, reader: str, caplog: pytest.LogCaptureFixture
) -> None:
    unfinished(here / "bad")
    error = read(reader, "bad")
    if reader not in INSPECTIONS:
        assert error.removeprefix("error: ").removeprefix("set 'new': ") == UNFINISHED
        return
    assert error is None
    assert UNFINISHED in [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if "json" in READERS[reader]:
        found = json.loads((here / "found.json").read_text())
        assert (found["complete"], found["samples"]) == (False, 4)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("part", ["autoencoder", "text_tower"])
def test_a_set_of_other_encoders_is_refused_if_they_are_known(
    here: Path, read: Callable, reader: str, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_index(here / "bad", {**index_of(here / "bad"), part: "0" * 64, f"{part}_used": "0" * 64})
    error = read(reader, "bad")
    line = f"bad/index.json: the set was made by another {part.replace('_', ' ')} (000000000000…) than that of "
    if reader in INSPECTIONS:
        assert error is None
        known = part == "autoencoder" and "--ckpt" in READERS[reader]
        assert (f"{line}tiny.safetensors (" in caplog.text) == known
    elif part == "autoencoder" or reader in READS_ENCODINGS:
        assert error.removeprefix("error: ").startswith(line)
        assert error.endswith("or use the release that made the set") and "\n" not in error
    else:  # training does not know the text tower of its release; see tests/ldm/callbacks/test_encoders.py
        assert error is None


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_reads_a_complete_set(here: Path, read: Callable, reader: str) -> None:
    assert read(reader, "bad") is None
