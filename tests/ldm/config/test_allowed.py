"""The list of classes that a config may name without trust: right, exact, and told without an import."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.config.allowed import ALLOWED, OWN_PACKAGES, nearest_allowed, reason_for
from ldm.training.described import MOVED
from ldm.util import get_obj_from_str

ROOT = Path(__file__).resolve().parents[3]
OLD = {"pytorch_lightning.loggers.TestTubeLogger", "pytorch_lightning.plugins.DDPPlugin"}
LISTED = [f"{allowed.module}.{name}" for allowed in ALLOWED for name in allowed.names]
DOCUMENT = ROOT / "docs" / "security.md"
WRITES = ("atomic_write", "open", "mkdir", "unlink", "rmtree", "system", "Popen", "urlopen", "urlretrieve")


def test_allowed_lists_classes_that_are_there():
    unknown = set()
    for target in LISTED:
        if target.startswith("lightning.") and importlib.util.find_spec("lightning") is None:
            continue  # the other name of the same package
        if target in OLD:
            assert target in MOVED and MOVED[target] in LISTED
        elif not inspect.isclass(get_obj_from_str(target)):
            unknown.add(target)
    assert not unknown
    assert len(LISTED) == len(set(LISTED)) and all(reason_for(target) for target in LISTED)


def test_allowed_classes_are_defined_in_the_library_that_names_them():
    for target in set(LISTED) - OLD:
        if target.startswith(("main.", "lightning.")):
            continue
        package = target.partition(".")[0]
        assert get_obj_from_str(target).__module__.partition(".")[0] == package


@pytest.mark.parametrize(
    "target",
    [
        "main.ImageLogger",
        "ldm.models.diffusion.ddpm.LatentDiffusion",  # which that module imports from another
        "ldm.models.diffusion.latent.LatentDiffusion",
        "ldm.models.autoencoder.VQModelInterface",
        "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "ldm.modules.losses.LPIPSWithDiscriminator",
        "ldm.optim.InBackward",
        "ldm.lr_scheduler.LambdaWarmUpCosineScheduler2",
        "ldm.data.datasets.ImageCaptionDataset",
        "ldm.callbacks.forgetting.Forgetting",
        "torch.nn.Identity",
        "pytorch_lightning.callbacks.LearningRateMonitor",
    ],
)
def test_reason_for_gives_one_for_each_class_on_the_list(target):
    assert reason_for(target)


@pytest.mark.parametrize(
    "target",
    [
        "ldm.cli.run.call",  # starts a process
        "ldm.shards.writer.ShardWriter",  # writes where it is told to
        "ldm.training.run.Run",
        "ldm.util.importlib",
        "ldm.models.diffusion.latent.torch",
        "ldm.models.diffusion.latent.Path",
        "ldm.models.diffusion.latent.check_reads_captions",  # a function
        "ldm.models.diffusion.latent.LatentDiffusion.load_state_dict",
        "ldm.models.diffusion.latent.__class__",
        "ldm.models.diffusion.latent",
        "ldm.models.nothing.Here",
        "ldm.models..latent.LatentDiffusion",
        "main.run",
        "main.importlib",
        "torch.load",
        "torch.hub.load",
        "torch.nn.Module.register_module",
        "torch.nn.DataParallel",
        "torch.nn.modules.module.OrderedDict",
        "torch.utils.cpp_extension.load_inline",
        "torchmetrics.multimodal.clip_score.CLIPScore",
        "torchmetrics.image.fid.FrechetInceptionDistance",
        "pytorch_lightning.loggers.WandbLogger",  # a process and a server
        "pytorch_lightning.loggers.MLFlowLogger",
        "pytorch_lightning.strategies.DeepSpeedStrategy",
        "pytorch_lightning.callbacks.LambdaCallback",
        "pytorch_lightning.cli.LightningCLI",
        "transformers.AutoModel.from_pretrained",
        "os.system",
        "builtins.eval",
        "evil",
        "",
        " torch.nn.Identity",
        "torch.nn.Identity\n",
    ],
)
def test_reason_for_gives_none_for_anything_else(target):
    assert reason_for(target) is None


def test_nearest_allowed_names_the_class_that_was_meant():
    assert nearest_allowed("torch.nn.Idenity") == "; did you mean 'torch.nn.Identity'?"
    assert "'ldm.models.diffusion.ddpm.LatentDiffusion'" in nearest_allowed("ldm.models.diffusion.ddpm.LatentDifusion")
    assert nearest_allowed("os.system") == ""


def test_reason_for_imports_nothing():
    targets = [*LISTED, "ldm.models.diffusion.ddpm.LatentDiffusion", "torchmetrics.multimodal.CLIPScore", "evil.Thing"]
    code = "import sys; from ldm.config.allowed import nearest_allowed, reason_for; before = set(sys.modules)\n"
    code += f"for target in {targets!r}: reason_for(target), nearest_allowed(target)\n"
    code += "new = {name for name in set(sys.modules) - before if not name.startswith('encodings')}\n"
    code += "sys.exit(f'imported {new}' if new or 'torch' in sys.modules else 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_importing_what_is_allowed_starts_no_process_and_asks_no_network():
    code = "import sys; seen = []\n"
    code += "forbidden = ('socket.connect', 'socket.getaddr', 'socket.gethostby', 'subprocess', 'os.exec', "
    code += "'os.posix_spawn', 'os.system', 'os.fork')\n"
    code += (
        "sys.addaudithook(lambda event, arguments: event.startswith(forbidden) and seen.append((event, arguments)))\n"
    )
    code += "from ldm.util import get_obj_from_str\n"
    names = [name for name in LISTED if name not in OLD and not name.startswith("lightning.")]
    code += f"for name in {names!r}: get_obj_from_str(name)\n"
    code += "sys.exit(str(seen) if seen else 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def only_reads(call: ast.Call) -> bool:
    """Return True for a call such as `path.open("rb")`."""
    modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    return getattr(call.func, "attr", "") == "open" and modes in ([], ["r"], ["rb"])


def test_classes_of_own_rooms_write_nothing_when_they_are_built():
    """A class that writes belongs into a room that configs do not name, or checks its folder when it writes."""
    found = []
    for room in OWN_PACKAGES:
        folder = ROOT / Path(*room.split("."))
        for path in [*folder.rglob("*.py"), folder.with_suffix(".py")]:
            if not path.is_file():
                continue
            for part in ast.walk(ast.parse(path.read_text())):
                if isinstance(part, ast.FunctionDef) and part.name in ("__init__", "__new__", "__post_init__"):
                    calls = [node for node in ast.walk(part) if isinstance(node, ast.Call) and not only_reads(node)]
                    names = {getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls}
                    found += [f"{path}: {part.name} calls {name}" for name in names & set(WRITES)]
    assert not found


def document_tables() -> dict[str, str]:
    """Return the tables of `docs/security.md`, by the names of the comments around them."""
    rooms = [f"| `{room}` | {reason} |" for room, reason in OWN_PACKAGES.items()]
    listed = []
    for allowed in ALLOWED:
        if allowed.module.startswith("lightning.pytorch"):
            continue  # the other name of the row before
        other = allowed.module.replace("pytorch_lightning", "lightning.pytorch")
        is_both = any(row.module == other and row.names == allowed.names for row in ALLOWED) and other != allowed.module
        module = f"`{allowed.module}`, `{other}`" if is_both else f"`{allowed.module}`"
        listed.append(f"| {module} | {', '.join(allowed.names)} | {allowed.reason} |")
    return {
        "rooms": "\n".join(["| room | why |", "|---|---|", *rooms]),
        "list": "\n".join(["| module | classes | why |", "|---|---|---|", *listed]),
    }


def written(text: str, tables: dict[str, str]) -> str:
    """Return the document `text` with `tables` in their places."""
    for name, table in tables.items():
        before, found, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        assert found and end
        text = f"{before}{found}\n{table}\n\n{end}{after}"
    return text


def test_allowed_is_what_the_document_says() -> None:
    text = DOCUMENT.read_text()
    tables = document_tables()
    assert written(text, tables) == text, "put these tables into docs/security.md:\n\n" + "\n\n".join(tables.values())


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(document_tables().values()) + "\n")
