"""Tests of the check of configs from other projects."""

from pathlib import Path

import pytest

from ldm.training.survey import Checked, check_config, find_configs, format_table, without_weights
from ldm.util import UserError

ROOT = Path(__file__).resolve().parents[3]
PUBLIC = sorted((ROOT / "tests/public_configs").glob("*.yaml"))
REFUSED = "another_project.yaml"
UNUSED = {"embedding_reg_weight", "unfreeze_model", "model_lr", "personalization_config"}
DECODER = "{target: ldm.models.autoencoder.IdentityFirstStage}"


def checked(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return check_config(path)


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.stem)
def test_check_config_takes_public_configs(path):
    row = check_config(path)
    if path.name == REFUSED:
        assert row.data == "fails"
        assert row.missing[0].startswith("main.DataModuleFromConfig(reg): regularisation images go into a prior")
        assert row.missing[1].startswith("ldm.data.personalized.PersonalizedBase: train on a folder")
    else:
        assert {row.model, row.data} in ({"builds", "resolves"}, {"builds", "-"}, {"resolves", "-"})
        unused = {line.partition(") is ignored: ")[0].rpartition("(")[2] for line in row.missing}
        assert unused == (UNUSED if path.name == "word_inversion.yaml" else set())


@pytest.mark.parametrize(
    ("text", "model", "data", "missing"),
    [
        (f"model: {DECODER}", "builds", "-", []),
        ("model: {params: {x: 1}}", "-", "-", []),  # an overlay
        ("other: {}", "-", "-", []),
        ("model: {type: prior, hparams: {}}", "fails", "-", ["a config of another program: type, hparams"]),
        (
            f"model: {{target: ldm.models.diffusion.ddpm.DDPM, params: {{unet_config: {DECODER}, "
            "personalization_config: {target: not.there}, unfreeze_model: true}}",
            "builds", "-",
            ["DDPM(personalization_config) is ignored: a word is", "DDPM(unfreeze_model) is ignored: the UNet"],
        ),
        (
            "model: {target: ldm.modules.encoders.modules.FrozenCLIPEmbedder, params: {extended_mode: true}}",
            "fails", "-", ["FrozenCLIPEmbedder(extended_mode): max_chunks: 3 reads captions of 225 tokens"],
        ),
        (
            "model: {target: ldm.models.autoencoder.Identity, params: {a: 1}}",
            "fails", "-", ["ldm.models.autoencoder.Identity"],
        ),
        ("model: {target: cldm.ControlNet}", "fails", "-", ["cldm.ControlNet"]),
        ("model: {target: os.system, params: {command: 'touch ran'}}", "fails", "-", ["os.system"]),
        (
            "model: {target: torch.nn.Linear, params: {in_features: 2, out: 3}}",
            "fails", "-", ["torch.nn.Linear(out)"],
        ),
        ("model: {target: torch.nn.Linear, params: {in_features: 2}}", "fails", "-", ["missing 1 required"]),
        (
            "data: {target: main.DataModuleFromConfig, params: {batch_size: 0}}",
            "-", "fails", ["data.params.batch_size 0"],
        ),
        (
            "data: {target: main.DataModuleFromConfig, params: {batch_size: 1, "
            "train: {target: ldm.data.simple.FolderData}}}",
            "-", "fails", ["missing a required argument: 'root_dir'"],
        ),
        ("data: {target: torchvision.transforms.Resize, params: {size: 3}}", "-", "resolves", []),
        ("model: '${nowhere}'", "-", "-", ["nowhere"]),
        ("model: [", "-", "-", ["not valid YAML"]),
    ],
)  # fmt: skip
def test_check_config_names_what_is_missing(tmp_path, monkeypatch, text, model, data, missing):
    monkeypatch.chdir(tmp_path)
    row = checked(tmp_path, text)
    assert (row.model, row.data, len(row.missing)) == (model, data, len(missing))
    assert all(part in whole and "\n" not in whole for part, whole in zip(missing, row.missing, strict=True))
    assert not (tmp_path / "ran").exists()


def test_check_config_imports_no_code_of_its_author(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: ...\n")
    assert checked(tmp_path, "model: {target: theirs.Model}").model == "fails"
    assert not (tmp_path / "ran").exists()


def test_check_config_shows_no_value_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "do not show")
    path = tmp_path / "a.yaml"
    path.write_text("model: {target: torch.nn.Linear, params: {in_features: '${oc.env:SECRET}', out_features: 1}}\n")
    checked = check_config(path)
    assert checked.model == "-" and "${oc.env:SECRET}" in checked.missing[0] and "do not" not in str(checked.missing)


def test_without_weights_drops_checkpoint_paths():
    config = {"ckpt_path": "a", "params": {"ckpt_path": "b", "list": [{"ckpt_dir": "c", "kept": 1}]}}
    assert without_weights(config) == {"params": {"list": [{"kept": 1}]}}


def test_find_configs(tmp_path):
    for name in ("a/x.yaml", "a/b/y.yml", "a/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("model: {}")
    found = find_configs([tmp_path / "a", tmp_path / "a/x.yaml"])
    assert [path.name for path in found] == ["y.yml", "x.yaml"]
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        find_configs([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.yaml or \.yml file"):
        find_configs([tmp_path / "empty"])


def test_table_counts_and_escapes():
    rows = [Checked("a", "builds", "fails", ["x | y", "z"]), Checked("b", "fails", "resolves"), Checked("c")]
    lines = format_table(rows).splitlines()
    assert lines[0] == "3 configs. Models: 1 build, 1 fail. Data: 1 resolve, 1 fail."
    assert lines[4:] == ["| a | builds | fails | x \\| y; z |", "| b | fails | resolves | - |", "| c | - | - | - |"]
