"""Tests of the command `tools/check_configs.py`."""

from tests.conftest import ROOT

TOOL = ROOT / "tools/check_configs.py"


def test_check_configs_prints_or_writes_the_same_table(tmp_path, run_tool, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    (tmp_path / "c.yaml").write_text("model: {target: torch.nn.Linear, params: {in_features: 2, out_features: 3}}\n")
    assert run_tool(TOOL, "c.yaml") is None
    [printed] = caplog.messages
    assert "| c.yaml | builds | - | - |" in printed
    assert run_tool(TOOL, ".", "--out", "table.md") is None
    assert (tmp_path / "table.md").read_text() == f"{printed}\n"


def test_check_configs_refuses_in_one_line(run_tool):
    assert run_tool(TOOL, "nowhere.yaml") == "error: nowhere.yaml: no such file or folder"


def test_the_table_of_the_compatibility_page_is_that_of_today(run_tool, monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    caplog.set_level("INFO", "__main__")
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    before, _, stands = page.partition("`python tools/check_configs.py configs tests/public_configs`:\n\n")
    assert run_tool(TOOL, "configs", "tests/public_configs") is None
    assert before != page and stands == f"{caplog.messages[-1]}\n", (
        "run the command that the page gives, and put its table there"
    )
