"""Configs: merging, overrides, lookup of bare names, and one clear line for each kind of bad input."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from ldm.config.load import build_model, find_config, load_config, plain
from ldm.util import UserError


def write(path, text):
    path.write_text(text)
    return path


def test_files_merge_left_to_right_and_overrides_come_last(tmp_path):
    first = write(tmp_path / "a.yaml", "model: {base_learning_rate: 1.0e-4, params: {x: 1, y: 2}}")
    second = write(tmp_path / "b.yaml", "model: {params: {y: 3}}\ndata: {params: {z: t}}")
    config = load_config([first, second], ["model.params.x=[1, 2]", "lightning.trainer.max_steps=5"])
    assert plain(config) == {
        "model": {"base_learning_rate": 1e-4, "params": {"x": [1, 2], "y": 3}},
        "data": {"params": {"z": "t"}},
        "lightning": {"trainer": {"max_steps": 5}},
    }


ADAM = "model: {params: {optimizer: {target: torch.optim.Adam, params: {amsgrad: true, weight_decay: 0.1}}}}"


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ("{params: {amsgrad: false}}", {"amsgrad": False, "weight_decay": 0.1}),
        ("{target: torch.optim.Adam}", {"amsgrad": True, "weight_decay": 0.1}),
        ("{target: torch.optim.SGD, params: {momentum: 0.9}}", {"weight_decay": 0.1, "momentum": 0.9}),
        ("{target: torch.optim.SGD, params: {amsgrad: 1}}", {"weight_decay": 0.1, "amsgrad": 1}),  # an error, later
    ],
)
@pytest.mark.parametrize("typed", [False, True])
def test_another_class_leaves_the_params_behind_that_it_does_not_take(tmp_path, over, expected, typed):
    base = write(tmp_path / "a.yaml", ADAM)
    if typed:
        config = load_config([base], [f"model.params.optimizer={over}"])
    else:
        config = load_config([base, write(tmp_path / "b.yaml", f"model: {{params: {{optimizer: {over}}}}}")])
    assert plain(config.model.params.optimizer.params) == expected


def test_a_class_that_is_not_there_keeps_all_params(tmp_path):
    base = write(tmp_path / "a.yaml", ADAM)
    config = load_config([base], ["model.params.optimizer.target=torch.optim.SDG"])
    assert plain(config.model.params.optimizer.params) == {"amsgrad": True, "weight_decay": 0.1}


def test_a_config_that_is_not_trusted_imports_nothing_when_configs_are_merged(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path / "imported_by_a_config.py", "class Mine:\n    def __init__(self, lr):\n        pass\n")
    base = write(tmp_path / "a.yaml", ADAM)
    mine = write(tmp_path / "b.yaml", "model: {params: {optimizer: {target: imported_by_a_config.Mine}}}")
    with pytest.raises(UserError, match="--trust-config"):
        load_config([base, mine])
    config = load_config([base, mine, base])  # nothing of it is left
    assert "imported_by_a_config" not in sys.modules
    assert config.model.params.optimizer.target == "torch.optim.Adam"
    assert plain(load_config([base, mine], trusted=True).model.params.optimizer.params) == {}
    assert "imported_by_a_config" in sys.modules


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("True", True), ("null", None), ("", None), ("abc", "abc"), ("{a: 1}", {"a": 1}), ("'1'", "1")],
)
def test_override_values_are_yaml(text, value):
    assert plain(load_config([], [f"model.x={text}"])) == {"model": {"x": value}}


def test_interpolations_resolve_across_files_and_overrides(tmp_path):
    path = write(tmp_path / "a.yaml", "model: {size: 8, params: {image_size: '${model.size}'}}")
    assert load_config([path], ["model.size=16"]).model.params.image_size == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", r"c\.yaml line 2: not valid YAML"),
        ("- 1", "found a list"),
        ("3", "not a YAML mapping"),
        ("modle: {}", "unknown section 'modle'; did you mean 'model'"),
        ("model: 3", "section 'model' must be a mapping, not 3"),
        ("model: {x: '${nowhere}'}", r"model\.x: .*'nowhere' not found"),
        ("model: {x: '${model.x}'}", r"model\.x: [Rr]ecursive"),
        ("model: {x: !!int y}", "not a readable config"),
        ("model: {x: !!timestamp y}", "not a readable config"),
        ("model: {x: " + "9" * 5000 + "}", "not a readable config"),
        ("model: " + "[" * 3000 + "]" * 3000, "not a readable config"),
        ("model: {x: a" + "a" * (1 << 20) + "}", "bytes, which is too large for a config"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, text, message):
    path = write(tmp_path / "c.yaml", text + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_config([path])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_configs_of_other_systems_are_read(tmp_path, encoding, end):
    text = "# café\nx: &x {a: 1e-4, b: [yes, 1]}\nmodel:\n  params:\n    <<: *x\n    c: é\t# a tab\n"
    (tmp_path / "c.yaml").write_bytes(text.replace("\n", end).encode(encoding))
    params = {"a": 1e-4, "b": [True, 1], "c": "é"}
    assert plain(load_config([tmp_path / "c.yaml"])) == {"model": {"params": params}}


def test_a_config_in_another_encoding_is_one_clear_line(tmp_path):
    (tmp_path / "c.yaml").write_bytes("model: {a: é}".encode("latin-1"))
    with pytest.raises(UserError, match=r"c\.yaml: not a config, .* not UTF-8 text \(.*\); save it as UTF-8$"):
        load_config([tmp_path / "c.yaml"])


@pytest.mark.parametrize("over", ["model:", "model:\ndata:\nlightning:", "", "# nothing"])
def test_a_section_with_nothing_in_it_says_nothing(tmp_path, over):
    base, empty = write(tmp_path / "a.yaml", "model: {a: 1}\n"), write(tmp_path / "b.yaml", over)
    assert plain(load_config([base, empty])) == plain(load_config([empty, base])) == {"model": {"a": 1}}


def test_a_section_that_is_typed_null_goes(tmp_path):
    base = write(tmp_path / "a.yaml", "model: {a: 1}\ndata: {b: 2}\n")
    assert plain(load_config([base], ["data=null"])) == {"model": {"a": 1}}


@pytest.mark.parametrize("override", ["model", "model..x=1", "=1", "model.x=[1", "trainer.max_steps=1"])
def test_bad_overrides_are_named(override):
    with pytest.raises(UserError) as caught:
        load_config([], [override])
    assert override in str(caught.value)


def test_a_bare_name_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("finetune_stable_diffusion.yaml").parts[-2:] == (
        "latent-diffusion",
        "finetune_stable_diffusion.yaml",
    )
    with pytest.raises(
        UserError, match=r"'finetune_stable_difusion.yaml' not found; did you mean 'finetune_stable_diff"
    ):
        find_config("finetune_stable_difusion.yaml")


def test_load_config_leaves_what_depends_on_the_environment_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_TEST_PLACE", "/secret")
    text = "model: {a: 1, b: '${.a}', c: '${oc.env:LDM_TEST_PLACE}/x', d: '${model.c}-${model.a}', e: ['${model.d}'], "
    text += "f: '${oc.select:model.a}', g: {h: 1}, i: '${model.g}', j: {k: '${model.c}'}, l: '${model.j}'}"
    config = load_config([write(tmp_path / "a.yaml", text)], trusted=True)
    assert OmegaConf.to_container(config)["model"] == {
        "a": 1,
        "b": 1,
        "c": "${oc.env:LDM_TEST_PLACE}/x",
        "d": "${model.c}-${model.a}",
        "e": ["${model.d}"],
        "f": "${oc.select:model.a}",
        "g": {"h": 1},
        "i": {"h": 1},
        "j": {"k": "${model.c}"},
        "l": "${model.j}",
    }
    assert plain(config.model)["e"] == ["/secret/x-1"] and plain(config)["model"]["l"] == {"k": "/secret/x"}


def test_build_model_takes_target_and_params(tmp_path):
    target = "model: {base_learning_rate: 1.0, target: torch.nn.Linear, params: {in_features: 2, out_features: 3}}"
    assert build_model(load_config([write(tmp_path / "a.yaml", target)])).weight.shape == (3, 2)
    with pytest.raises(UserError, match="no 'model' section"):
        build_model(load_config([]))
    with pytest.raises(UserError, match="unknown key 'parms' beside target"):
        build_model(load_config([], ["model.target=torch.nn.Linear", "model.parms.in_features=2"]))


def test_reading_a_config_imports_no_torch():
    code = "import sys, ldm.config.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sections_of_other_programs_are_left_out_with_one_warning(tmp_path, caplog):
    text = "size: 8\nsampling: {steps: 50}\nmodel: {params: {image_size: '${size}'}}\n"
    config = load_config([write(tmp_path / "c.yaml", text)])
    assert plain(config) == {"model": {"params": {"image_size": 8}}}  # an interpolation may take values from them
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "c.yaml: sections ignored: size, sampling" in record.message
    assert record.message.endswith("known sections: model, data, lightning")


def test_sections_that_need_trust_need_none_where_nothing_reads_them(tmp_path):
    path = write(tmp_path / "c.yaml", "other: {target: os.system, url: 'pipe:ls'}\nmodel: {}\n")
    assert list(load_config([path])) == ["model"]


@pytest.mark.parametrize("params", ["3", "a", "[1]"])
@pytest.mark.parametrize("where", ["model", "data", "lightning.logger", "lightning.callbacks.image_logger"])
def test_params_that_are_no_mapping_are_refused(where, params):
    with pytest.raises(UserError, match=rf"^{where}\.params .*: give a mapping of parameters, or leave it out"):
        load_config([], [f"{where}.params={params}"], trusted=True)
    assert load_config([], [f"{where}.params=null"])


def test_a_config_without_a_name_is_refused():
    with pytest.raises(UserError, match="--base '': names no file"):
        load_config([""])


def test_a_section_that_belongs_into_lightning_is_told(tmp_path, caplog):
    load_config([write(tmp_path / "c.yaml", "model: {}\ntrainer: {max_steps: 9}\n")])
    assert "c.yaml: trainer has an effect inside the section lightning only" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", "hello", "not a YAML mapping with the sections model, data, lightning"),
        ("c.toml", "[general]\nbucket = true\n", "is TOML, which other programs read; give a YAML config"),
    ],
)
def test_files_of_other_programs_are_refused(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        load_config([write(tmp_path / "whole.yaml", "model: {}\n"), write(tmp_path / name, text)])
