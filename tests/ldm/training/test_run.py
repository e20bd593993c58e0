"""Tests of run folders and of --resume."""

import os

import pytest

from ldm.locks import LOCK, locked_file
from ldm.training.arguments import parse_arguments
from ldm.training.run import hold_run, plan_run
from ldm.util import UserError


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def plan(line):
    return plan_run(parse_arguments(line.split()))


@pytest.fixture
def old_run(tmp_path):
    folder = tmp_path / "logs" / "old"
    for name in (
        "checkpoints/last.ckpt",
        "configs/2-project.yaml",
        "configs/1-project.yaml",
        "configs/1-lightning.yaml",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("-b sub/a.yaml b.yaml", "a"),
        ("-b a.yaml -n mine", "mine"),
        ("-b a.yaml -f x", "a_x"),
        ("-b a.yaml -n mine -f _x", "mine_x"),
    ],
)
def test_a_new_run_is_named_by_time_and_config(line, name):
    run = plan(line)
    assert run.resume is None and run.saved_configs == []
    assert run.folder.name == f"{run.started}_{name}" and run.folder.parent.name == "logs"


def test_two_runs_in_a_second_get_two_folders(monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "now")
    assert [plan("-b a.yaml").folder.name for _ in range(3)] == ["now_a", "now_a-2", "now_a-3"]


def test_a_tilde_that_the_shell_has_left_is_a_folder_of_that_name_or_the_home_folder(tmp_path, monkeypatch):
    """Lightning expands a path that begins with ~, so such a folder is named in full."""
    (tmp_path / "~mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert plan("-b a.yaml -l ~mine").folder.parent == tmp_path / "~mine"
    assert plan("-b a.yaml -l ~/logs").folder.parent == tmp_path / "home" / "logs"


@pytest.mark.parametrize("line", ["-b a.yaml -l $HOME/logs", "-b a.yaml -n x$HOME", "-b ${HOME}.yaml"])
def test_the_name_of_a_variable_in_the_path_of_a_run_is_refused(line):
    with pytest.raises(UserError, match="Lightning would replace the variable in this path; rename the folder"):
        plan(line)


def test_the_processes_of_one_run_share_its_folder(monkeypatch):
    first = plan("-b a.yaml")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert plan("-b a.yaml").folder == first.folder


@pytest.mark.parametrize("path", ["logs/old", "logs/old/checkpoints", "logs/old/checkpoints/last.ckpt"])
def test_resuming_in_a_run_continues_in_its_folder(old_run, path):
    run = plan(f"--resume {path}")
    assert run.folder.resolve() == old_run
    assert run.resume.resolve() == old_run / "checkpoints" / "last.ckpt"
    assert [path.name for path in run.saved_configs] == ["1-lightning.yaml", "1-project.yaml", "2-project.yaml"]


def test_resuming_from_elsewhere_makes_a_new_run(tmp_path):
    (tmp_path / "hacked.ckpt").touch()
    run = plan("--resume hacked.ckpt -b a.yaml")
    assert run.folder.parent.name == "logs" and run.resume.name == "hacked.ckpt" and run.saved_configs == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-b a.yaml -l hacked.ckpt", "--logdir hacked.ckpt: hacked.ckpt is a file; name a folder"),
        ("-b a.yaml -l hacked.ckpt/logs", "--logdir hacked.ckpt/logs: hacked.ckpt is a file; name a folder"),
        ("--resume nowhere", "--resume nowhere: no such run folder or checkpoint"),
        ("--resume empty", "empty: has no checkpoints/last.ckpt"),
        ("--resume hacked.ckpt", "hacked.ckpt: not in a run folder, so its config is unknown"),
        ("--resume logs/old -n new", "--name 'new' is for a new run"),
    ],
)
def test_plan_run_refuses_what_cannot_be_resumed(tmp_path, old_run, line, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hacked.ckpt").touch()
    with pytest.raises(UserError, match=message):
        plan(line)


@pytest.mark.parametrize("text", ["../x", "/x", "a/b", "a/..", "a\\b", "a\nb", "\x1b[2J", "a\udcff"])
def test_plan_run_refuses_a_name_that_is_a_path(text):
    for option in ("--name", "--postfix"):
        with pytest.raises(UserError, match=f"{option} .*becomes part of a folder name") as caught:
            plan_run(parse_arguments(["-b", "a.yaml", f"{option}={text}"]))
        assert str(caught.value).isprintable()


def test_plan_run_refuses_a_link_that_leads_out_of_the_run(old_run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (old_run / "checkpoints" / "older.ckpt").symlink_to(tmp_path / "any.ckpt")  # a checkpoint may be a link
    (old_run / "csv").mkdir()
    (old_run / "csv" / "inside").symlink_to(old_run / "configs")
    assert plan(f"--resume {old_run}").folder == old_run
    for name in ("images", "csv/version_0", "checkpoints/x.ckpt"):
        (old_run / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=f"link '.*{name}': lies outside .*old"):
            plan(f"--resume {old_run}")
        (old_run / name).unlink()
    (old_run / "csv" / "metrics.csv").symlink_to(tmp_path / "not-there-yet.csv")
    with pytest.raises(UserError, match=r"metrics\.csv': lies outside"):
        plan(f"--resume {old_run}")


def test_a_run_folder_may_itself_be_a_link(old_run, tmp_path):
    (tmp_path / "mine").symlink_to(old_run)
    assert plan("--resume mine").resume is not None


def test_hold_run_removes_a_run_that_fails_before_its_first_step(tmp_path):
    run = plan("-b a.yaml")
    with pytest.raises(UserError), hold_run(run):
        (run.folder / "csv").mkdir()
        raise UserError("no data")
    assert not list(tmp_path.iterdir())


def test_hold_run_keeps_an_existing_run(old_run):
    with pytest.raises(UserError), hold_run(plan("--resume logs/old")):
        raise UserError("no data")
    assert (old_run / "checkpoints" / "last.ckpt").is_file() and not (old_run / LOCK).exists()


def test_hold_run_refuses_a_second_process_and_removes_unfinished_files(old_run):
    host = os.uname().nodename
    left = old_run / "images" / "train" / f".a.{host}.999999999.ab.tmp.png"
    left.parent.mkdir(parents=True)
    left.touch()
    with hold_run(plan("--resume logs/old")):
        assert not left.exists()
        with (
            pytest.raises(UserError, match=rf"logs/old: process {os.getpid()} on '{host}' is writing it"),
            hold_run(plan("--resume logs/old")),
        ):
            pass
        assert (old_run / LOCK).exists()
    with hold_run(plan("--resume logs/old")):
        pass


def test_hold_run_refuses_a_checkpoint_that_another_process_is_writing(tmp_path):
    (tmp_path / "hacked.ckpt").touch()
    run = plan("--resume hacked.ckpt -b a.yaml")
    with (
        locked_file(tmp_path / "hacked.ckpt"),
        pytest.raises(UserError, match=rf"hacked.ckpt: process {os.getpid()} on .* is writing it"),
        hold_run(run),
    ):
        pass
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("name", ["old", "old/", "logs/old/", "old/checkpoints", "old/checkpoints/last.ckpt"])
def test_plan_run_resumes_a_run_by_its_name_in_the_folder_of_runs(old_run, name):
    assert plan(f"--resume {name} -t").resume.resolve() == old_run / "checkpoints" / "last.ckpt"


def test_plan_run_finds_runs_with_slashes_and_elsewhere(tmp_path, old_run):
    (tmp_path / "runs/a").mkdir(parents=True)
    old_run.rename(tmp_path / "runs/a/b")
    assert plan("--resume a/b -l runs -t").folder.resolve() == tmp_path / "runs/a/b"


def test_paths_in_the_home_folder_are_found_after_an_equals_sign(tmp_path, old_run, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plan("--resume=~/logs/old -t").folder == old_run
    assert plan("--base=~/a.yaml --logdir=~/runs -t").folder.parent == tmp_path / "runs"
