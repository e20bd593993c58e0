"""A config runs no code of its author's, and sends nothing away, unless the person who gives it trusts it."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from ldm.config.load import load_config, needs_trust
from ldm.config.trust import check_trust
from ldm.util import UserError
from tests.conftest import ROOT


def config(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "target",
    [
        "main.ImageLogger",
        "ldm.models.diffusion.ddpm.LatentDiffusion",
        "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "torch.nn.Identity",
        "torch.optim.AdamW",
        "pytorch_lightning.callbacks.LearningRateMonitor",
        "pytorch_lightning.loggers.TensorBoardLogger",
        "pytorch_lightning.loggers.TestTubeLogger",  # of 2022, which Lightning no longer has
        "pytorch_lightning.plugins.DDPPlugin",
    ],
)
def test_what_configs_of_2022_name_needs_no_trust(tmp_path, target):
    path = config(tmp_path, f"model: {{params: {{part: [{{target: {target}}}]}}}}")
    assert load_config([path]).model.params.part[0].target == target


@pytest.mark.parametrize("key", ["target", "_target_", "class_path"])
@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "evil",
        "[torch.nn.Identity, os.system]",
        "3",
        "torch.load",
        "ldm.cli.run.call",
        "torchmetrics.multimodal.clip_score.CLIPScore",
        "pytorch_lightning.loggers.WandbLogger",
        "'${model.o}s.system'",
    ],
)
def test_other_targets_ask_for_trust_in_one_line(tmp_path, key, target):
    path = config(tmp_path, f"model: {{o: o}}\nlightning: {{callbacks: {{a: {{b: [{{{key}: {target}}}]}}}}}}")
    with pytest.raises(UserError, match=r"c\.yaml: target '.*' is not on the list .*give --trust-config") as caught:
        load_config([path])
    assert "\n" not in str(caught.value)
    load_config([path], trusted=True)


def test_a_slip_is_told_with_what_was_meant(tmp_path):
    with pytest.raises(UserError, match=r"'torch.nn.Idenity' is not on the list .*did you mean 'torch.nn.Identity'\?"):
        load_config([config(tmp_path, "model: {target: torch.nn.Idenity}")])


def test_a_module_beside_the_config_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Thing: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="trust-config"):
        load_config([config(tmp_path, "model: {target: evil.Thing}")])
    assert not (tmp_path / "ran").exists()


def test_check_trust_imports_nothing(tmp_path):
    targets = [
        "torch.nn.Identity",
        "torchmetrics.MeanMetric",
        "transformers.optimization.Adafactor",
        "main.ImageLogger",
    ]
    path = config(tmp_path, "model: {x: [" + ", ".join(f"{{target: {target}}}" for target in targets) + "]}")
    code = f"import sys; from ldm.config.load import load_config; load_config([{str(path)!r}])\n"
    code += "sys.exit(bool({'torch', 'torchmetrics', 'transformers', 'pytorch_lightning', 'main'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    "value",
    [
        "'pipe:ls'",
        "['a.tar', 'b.tar::pipe:ls']",
        "'{p,q}ipe:ls'",
        "'file:pipe:ls'",
        r"'\pipe:ls'",
        "'PIPE:ls'",
        "'${model.p}ipe:ls'",
        "!!python/object/apply:pathlib.PosixPath ['pipe:ls']",
        "{'pipe:ls': a}",
    ],
)
def test_commands_to_read_from_ask_for_trust(tmp_path, value):
    path = config(tmp_path, f"model: {{p: p}}\ndata: {{params: {{training_urls: {value}}}}}")
    with pytest.raises(UserError, match=r"c\.yaml: .*ls' runs a command; give --trust-config"):
        load_config([path])
    load_config([path], trusted=True)


def test_prompts_of_previews_are_texts(tmp_path):
    prompts = "['a cat: http://x', '!loud', {prompt: 'style:photo', seed: 1}]"
    load_config([config(tmp_path, f"lightning: {{previews: {{prompts: {prompts}}}}}")])
    with pytest.raises(UserError, match=r"'pipe:ls' runs a command; give --trust-config"):
        load_config([config(tmp_path, f"lightning: {{previews: {{prompts: {prompts}, release: 'pipe:ls'}}}}")])


@pytest.mark.parametrize(
    "text",
    [
        "data: {params: {val_urls: 'http://host/?k=1'}}",
        "model: {params: {ckpt_path: 's3://bucket/a.ckpt'}}",
        "lightning: {logger: {params: {save_dir: 'gs://bucket'}}}",
        "lightning: {logger: {params: {host: 'https://host'}}}",
        "lightning: {callbacks: {a: {params: {dirpath: 'memory://x'}}}}",
        "lightning: {modelcheckpoint: {params: {dirpath: 'hf://x'}}}",
    ],
)
def test_urls_ask_for_trust(tmp_path, text):
    with pytest.raises(UserError, match=r"c\.yaml: .* is a URL, .*; give --trust-config"):
        load_config([config(tmp_path, text)])
    load_config([config(tmp_path, text)], trusted=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lightning: {logger: {params: {name: '$HOME'}}}", r"'\$HOME' refers to an environment variable"),
        ("lightning: {logger: {params: {version: 'a${HOME}'}}}", "an untrusted config may only use|not found"),
        ("lightning: {trainer: {model_registry: mine}}", "'mine' uploads checkpoints"),
    ],
)
def test_what_a_library_would_do_with_a_text_asks_for_trust(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_config([config(tmp_path, text)])


def test_what_a_person_types_is_trusted_where_it_was_typed(tmp_path):
    typed = [
        "model.target=some.module.Thing",
        "data.params.training_urls='pipe:cat a.tar'",
        "data.params.x={a: 's3://b'}",
    ]
    assert load_config([], typed).model.target == "some.module.Thing"
    for text in ("data: {params: {val_urls: 'pipe:cat a.tar'}}", "model: {params: {x: {target: some.module.Thing}}}"):
        with pytest.raises(UserError, match="give --trust-config"):
            load_config([config(tmp_path, text)], typed)


def test_a_typed_reference_to_what_a_file_says_is_the_files(tmp_path):
    path = config(tmp_path, "model: {p: p}")
    with pytest.raises(UserError, match="'pipe:ls' runs a command"):
        load_config([path], ["data.params.training_urls=${model.p}ipe:ls"])


@pytest.mark.parametrize(
    "reference", ["${ model.p }", "${oc.select:model.p}", "${oc.deprecated:model.p}", "${model.${oc.env:A,p}}"]
)
def test_a_typed_reference_is_the_files_however_it_is_written(tmp_path, reference):
    path = config(tmp_path, "model: {p: p}")
    with pytest.raises(UserError, match="give --trust-config"):
        load_config([path], [f"data.params.training_urls={reference}ipe:ls"])


def test_check_trust_takes_any_plain_data():
    check_trust({"a": [1, None, 1.5, True, {"target": None}], 3: {"target": "torch.nn.Identity"}}, "config")


def test_needs_trust_is_asked_of_a_config_as_it_would_be_read():
    assert not needs_trust(OmegaConf.create({"model": {"target": "torch.nn.Identity", "a": 1, "b": "${.a}"}}))
    for model in ({"target": "os.system"}, {"x": "pipe:ls"}, {"x": "${oc.env:HOME}"}, {"x": "http://h"}):
        assert needs_trust(OmegaConf.create({"model": model}))
