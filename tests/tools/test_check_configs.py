"""Tests of the command `tools/check_configs.py`."""

from tests.conftest import ROOT

TOOL = ROOT / "tools/check_configs.py"


def test_check_configs_prints_or_writes_the_same_table(tmp_path, command):
    (tmp_path / "c.yaml").write_text("model: {target: torch.nn.Linear, params: {in_features: 2, out_features: 3}}\n")
    printed = command(TOOL, "c.yaml")
    assert printed.returncode == 0, printed.stderr
    assert "| c.yaml | builds | - | - |" in printed.stdout
    written = command(TOOL, ".", "--out", "table.md")
    assert written.returncode == 0 and (tmp_path / "table.md").read_text() == printed.stdout


def test_check_configs_refuses_in_one_line(tmp_path, command):
    done = command(TOOL, "nowhere.yaml")
    assert done.returncode == 1 and done.stderr == "error: nowhere.yaml: no such file or folder\n"


def test_the_table_of_the_compatibility_page_is_that_of_today(command):
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    before, _, stands = page.partition("`python tools/check_configs.py configs tests/public_configs`:\n\n")
    made = command(TOOL, "configs", "tests/public_configs", cwd=ROOT)
    assert made.returncode == 0, made.stderr
    assert before != page and stands == made.stdout, "run the command that the page gives, and put its table there"
