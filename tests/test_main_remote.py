"""Tests of main.py on a set on a server: the same training as on the local set, also after an interruption."""

import signal

import pytest

from ldm.remote import retries
from ldm.util import UserError
from tests.ldm.set_server import serving_with_tables
from tests.sent_signals import sending
from tests.training_runs import (  # noqa: F401
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    the_run,
    write_index,
)

NAMES = "s-{000000..000001}.tar?token=abcdefgh"


@pytest.fixture
def server(train, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retries, "PAUSES", (0.01, 0.01, 0.01))
    write_index(tmp_path / "shards")
    with serving_with_tables(tmp_path / "shards", monkeypatch) as server:
        yield server


@pytest.mark.parametrize("options", ["data.params.num_workers=0", "data.params.num_workers=2"])
def test_an_interrupted_run_on_a_server_equals_one_on_the_local_set(server, train, tmp_path, capsys, options):
    urls = f"data.params.training_urls={server.url}/{NAMES}"
    assert train(f"-l straight --max_steps 9 {options}") == 0
    server.fault = lambda name, number: 503 if number % 3 == 1 else None
    assert train(f"-l remote --max_steps 9 {urls} {options} {sending(4, signal.SIGINT)}") == 0
    run = the_run(tmp_path / "remote")
    server.has_ranges = False  # another server may take over
    assert train(f"--resume {run} --max_steps 9 {urls} {sending(0, signal.SIGINT)}") == 0
    assert_same_training(the_run(tmp_path / "straight"), run)
    shown = capsys.readouterr()
    saved = "".join(path.read_text() for path in (run / "configs").iterdir())
    assert "token=<hidden>" in saved and "abcdefgh" not in saved + shown.out + shown.err


def test_a_set_that_changes_on_its_server_ends_the_run_in_one_line(server, train):
    def change(name, number):
        if server.requests["s-000000.tar"] > 5:
            for path in server.folder.glob("*.tar"):
                with path.open("r+b") as file:
                    file.seek(-1, 2)
                    file.write(b"\1")

    server.fault = change
    with pytest.raises(UserError, match="was replaced or changed while it was in use") as caught:
        train(f"-l logs --max_steps 30 data.params.training_urls={server.url}/{NAMES}")
    assert "\n" not in str(caught.value) and "abcdefgh" not in str(caught.value)
