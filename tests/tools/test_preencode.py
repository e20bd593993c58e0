"""Tests of the command `tools/preencode.py` on a tiny model of the released layout and real image files."""

import json
import os
import re
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks.fork_server import run_script, start_script
from ldm.checkpoint import save_checkpoint
from ldm.config.load import load_config
from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.images.transforms import fit_square
from ldm.release.load import load_release
from ldm.shards import npy
from ldm.shards.reader import ShardDataset
from ldm.util import instantiate_from_config
from tests.waiting import join

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/preencode.py"
CONFIG = ROOT / "configs/latent-diffusion/demo_tiny_release.yaml"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Save a checkpoint with the demo's layout and random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("release") / "model.ckpt"
    model = instantiate_from_config(load_config([CONFIG]).model)
    save_checkpoint({"state_dict": model.state_dict()}, path)
    return path


@pytest.fixture
def images(tmp_path):
    """Make a folder of four images of different formats with captions, and a damaged one."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(folder / "rotated.jpg", exif=exif)
    pixels.convert("CMYK").save(folder / "cmyk.jpg")
    pixels.convert("RGBA").save(folder / "alpha.png")
    pixels.convert("L").save(folder / "grey.webp")
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text("a cat" if path.suffix == ".jpg" else f"a {path.stem} dog")
    (folder / "broken.png").write_bytes((folder / "alpha.png").read_bytes()[:2000])
    (folder / "broken.txt").write_text("never seen")
    return folder


def preencode(*arguments):
    """Run the command in a forked process."""
    return run_script([str(TOOL), *map(str, arguments)], Path.cwd(), {**os.environ, "CUDA_VISIBLE_DEVICES": ""})


@pytest.fixture
def here(run_tool):
    """Return a function that runs the command in this process, and returns None or the error line."""
    return partial(run_tool, TOOL)


def test_help_imports_neither_torch_nor_lightning(help_of):
    printed, packages = help_of(TOOL)
    assert "--shard-size" in printed and not packages & {"torch", "pytorch_lightning", "lightning"}


def test_from_images_to_batches(release, images, tmp_path):
    out = tmp_path / "out" / "toms-%06d.tar"
    result = preencode(
        *("--ckpt", release, "--config", CONFIG, "--images", images, "--out", out),
        *("--size", 64, "--batch-size", 3, "--shard-size", 4, "--flip", "--num-workers", 1),
    )
    assert result.returncode == 0, result.stderr
    assert "image skipped: broken.png" in result.stdout + result.stderr
    last = result.stdout.strip().splitlines()[-1]
    assert "wrote 8 samples of 4 images in 3 shards" in last and "1 images failed, 0 without a caption" in last

    shards = sorted(out.parent.glob("*.tar"))
    dataset = ShardDataset(shards)
    assert [dataset[i]["__key__"] for i in range(0, 8, 2)] == [
        "000000_alpha",
        "000002_cmyk",
        "000003_grey",
        "000004_rotated",
    ]
    model = load_release(release, CONFIG)
    rotated = dataset[6]
    with Image.open(images / "rotated.jpg") as image:
        upright = np.array(image.transpose(Image.Transpose.ROTATE_270))
    with torch.no_grad():
        view = fit_square(torch.from_numpy(upright), 64)[None]
        expected = model.first_stage_model.encode(view).parameters[0].numpy()
        mirrored = model.first_stage_model.encode(view.flip(-1)).parameters[0].numpy()
        context = model.get_learned_conditioning(["a cat", ""]).numpy()
    np.testing.assert_allclose(rotated["f8"], expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(dataset[7]["f8"], mirrored, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(rotated["t5"], context[0], rtol=2e-3, atol=2e-3)
    null = npy.decode(bytearray((out.parent / "null.t5.npy").read_bytes()), "null")
    np.testing.assert_allclose(null, context[1], rtol=2e-3, atol=2e-3)
    assert len(json.loads((out.parent / "index.json").read_text())["shards"]) == 3

    data = WebDataNpyModuleFromConfig(8, str(out.parent / "toms-{000000..000002}.tar"), null_cond_dropout=0.1)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["f8"].shape == (8, 32, 8, 8) and batch["t5"].shape == (8, *context.shape[1:])


def test_two_processes_make_the_same_set_as_one(here, release, images, tmp_path):
    common = ("--ckpt", release, "--config", CONFIG, "--images", images, "--size", 64, "--num-workers", 0)
    common += ("--shard-size", 2, "--device", "cpu")
    words = [str(word) for word in (TOOL, *common, "--out", tmp_path / "two" / "s-%d.tar")]
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in range(2)]
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    processes = [
        start_script(words, tmp_path, log, environment={**os.environ, **rank})
        for log, rank in zip(logs, ranks, strict=True)
    ]
    codes, output = join(*processes), [log.read_text() for log in logs]
    assert codes == [0, 0], output
    assert here(*common, "--out", tmp_path / "one" / "s-%d.tar") is None
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert sorted(one) == ["index.json", "null.t5.npy", "s-0.tar", "s-1.tar", "s-2.tar"]
    assert "rank 1 of 2 wrote 2 samples" in output[1] and "wrote 4 samples of 4 images in 3 shards" in output[0]


def test_overwrite_is_refused_with_several_processes(here, release, images, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    out = ("--out", tmp_path / "s-%d.tar")
    error = here("--ckpt", release, "--config", CONFIG, "--images", images, *out, "--overwrite")
    assert re.search("^error: --overwrite: not possible with several processes", error)


def test_tars_and_metadata_and_one_caption(here, release, images, tmp_path):
    with tarfile.open(tmp_path / "in-0.tar", "w") as tar:
        for path in sorted(images.glob("*")):
            tar.add(path, path.name)
    lines = [json.dumps({"file_name": name, "text": "from a list"}) for name in ("alpha.png", "cmyk.jpg")]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    common = ("--ckpt", release, "--config", CONFIG, "--size", 64, "--precision", "bf16", "--num-workers", 0)
    for name, source, extra, captions in (
        ("tar", tmp_path / "in-{0..0}.tar", ("--caption", "tom"), {"tom"}),
        ("list", images, (), {"from a list"}),
    ):
        assert here(*common, "--images", source, "--out", tmp_path / name / "s.tar", *extra) is None
        dataset = ShardDataset([tmp_path / name / "s.tar"])
        assert {dataset[i]["txt"] for i in range(len(dataset))} == captions


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no images", "nowhere: no such file"),
        ("no checkpoint", r"none\.ckpt"),
        ("no text encoder", "DummyEncoder, reads no captions"),
        ("bad size", "--size 70"),
        ("bad value", r"alpha\.png: encodes to NaN or infinity"),
        ("bad workers", "--num-workers -1: give a whole number of at least 0"),
        ("existing", "give --overwrite to replace 1 shards"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(here, release, images, tmp_path, case, message):
    arguments = {"--ckpt": release, "--config": CONFIG, "--images": images, "--size": 64, "--num-workers": 0}
    arguments["--out"] = tmp_path / "out" / "s-%d.tar"
    before = []
    if case == "no images":
        arguments["--images"] = tmp_path / "nowhere"
    elif case == "no checkpoint":
        arguments["--ckpt"] = tmp_path / "none.ckpt"
    elif case == "no text encoder":
        config = yaml.safe_load(CONFIG.read_text())
        target = "ldm.modules.encoders.modules.DummyEncoder"
        config["model"]["params"]["cond_stage_config"] = {"target": target, "params": {"key": "t5"}}
        arguments["--config"] = tmp_path / "dummy.yaml"
        arguments["--config"].write_text(yaml.safe_dump(config))
    elif case == "bad size":
        arguments["--size"] = 70
    elif case == "bad workers":
        arguments["--num-workers"] = -1
    elif case == "bad value":
        weights = torch.load(release, weights_only=True)
        weights["state_dict"]["first_stage_model.quant_conv.bias"].fill_(1e6)
        arguments["--ckpt"] = tmp_path / "large.ckpt"
        torch.save(weights, arguments["--ckpt"])
    else:
        before = [tmp_path / "out" / "s-0.tar"]
        before[0].parent.mkdir()
        before[0].touch()
    error = here(*(word for pair in arguments.items() for word in pair))
    assert re.search(f"^error: .*{message}", error) and "\n" not in error
    assert list((tmp_path / "out").glob("*")) == before
