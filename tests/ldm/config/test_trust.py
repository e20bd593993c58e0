"""A config runs no code of its author's, unless the person who gives it says that it is trusted."""

import pytest

from ldm.config.load import load_config
from ldm.util import UserError


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
        "torch.nn.Idenity",  # a slip is for whoever builds it to name
    ],
)
def test_what_configs_of_2022_name_needs_no_trust(tmp_path, target):
    path = config(tmp_path, f"model: {{params: {{part: [{{target: {target}}}]}}}}")
    assert load_config([path]).model.params.part[0].target == target


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "none of the packages"),
        ("builtins.eval", "none of the packages"),
        ("subprocess.Popen", "none of the packages"),
        ("evil", "none of the packages"),
        ("torch.load", "no class"),
        ("torch.hub.load", "no class"),
        ("torch.utils.cpp_extension.load_inline", "no class"),
        ("ldm.cli.run.call", "no class"),
        ("ldm.util.importlib", "no class"),
        ("torch.nn.modules.module.OrderedDict", "defined in collections"),
        ("ldm.config.load.Path", "defined in pathlib"),
        ("torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler", "defined in torch.dist"),
        ("pytorch_lightning.cli.LightningCLI", r"defined in pytorch_lightning\.cli"),
        ("torch.package.PackageImporter", r"defined in torch\.package"),
    ],
)
def test_other_targets_ask_for_trust_in_one_line(tmp_path, target, message):
    path = config(tmp_path, f"lightning: {{callbacks: {{a: {{target: {target}}}}}}}")
    with pytest.raises(UserError, match=f"c.yaml: target '{target}' .*{message}.*--trust-config") as caught:
        load_config([path])
    assert "\n" not in str(caught.value)
    assert load_config([path], trusted=True).lightning.callbacks.a.target == target


def test_a_module_beside_the_config_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Thing: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="trust-config"):
        load_config([config(tmp_path, "model: {target: evil.Thing}")])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        "'pipe:ls'",
        "['a.tar', 'b.tar::pipe:ls']",
        "'{p,q}ipe:ls'",
        "'file:pipe:ls'",
        r"'\pipe:ls'",
        "'${model.p}ipe:ls'",
        "!!python/object/apply:pathlib.PosixPath ['pipe:ls']",
    ],
)
def test_commands_to_read_from_ask_for_trust(tmp_path, value):
    path = config(tmp_path, f"model: {{p: p}}\ndata: {{params: {{training_urls: {value}}}}}")
    with pytest.raises(UserError, match=r"c\.yaml: .*ls' runs a command; give --trust-config"):
        load_config([path])
    load_config([path], trusted=True)


def test_what_a_person_types_is_trusted():
    typed = ["model.target=some.module.Thing", "data.params.training_urls='pipe:cat a.tar'"]
    assert load_config([], typed).model.target == "some.module.Thing"
