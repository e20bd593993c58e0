"""The commands that run under the guard of `tests/hostile/guard.py`: good ones, hostile names, and resumed runs."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import encoder_digests, load_checkpoint, load_state_dict, save_checkpoint, save_state_dict
from ldm.config.load import build_model
from ldm.shards.index import write_index
from ldm.shards.verify import file_sha256
from tests.golden_data import fill_seeded
from tests.hostile.checkpoint_files import zip_of
from tests.ldm.shard_files import write_set, write_tar
from tests.training_runs import CONFIG, TEXT_TOWER

RELEASE = "--ckpt tiny.safetensors --device cpu --config release.yaml"
TRAIN = "main.py -b tiny.yaml -t --no-test -l logs --max_steps 1"
COMMANDS = {
    "main": TRAIN,
    "evaluate": f"tools/evaluate.py --base tiny.safetensors {RELEASE} --timesteps 1 --out out --set new=good",
    "make_prior": f"tools/make_prior.py {RELEASE} --prompt x --steps 1 --out prior/%d.tar --overwrite",
    "inspect_shards": f"tools/inspect_shards.py {RELEASE} --sheet out/sheet.png good",
    "txt2img": f"tools/txt2img.py {RELEASE} --prompt x --steps 1 --out out",
    "preencode": f"tools/preencode.py {RELEASE} --images images --size 64 --num-workers 0 --out set/%d.tar --overwrite",
    "hack_weights": "tools/hack_weights.py --base tiny.yaml --release tiny.safetensors --out out/hacked.ckpt",
    "plan_memory": "tools/plan_memory.py --base tiny.yaml --batch 1",
    "extract_lora": "tools/extract_lora.py --base tiny.safetensors --tuned tuned.safetensors --rank 1 --check good "
    "--out out/lora.safetensors --config release.yaml --device cpu",
}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"  # Pillow starts Ghostscript for it
# Colours the terminal, begins a line, and turns the letters after it around.
NAME = "\x1b[31m\nFORGED\u202e"
RANKED = {"target": "pytorch_lightning.callbacks.ModelCheckpoint"}
RANKED["params"] = {"monitor": "train/loss_simple", "save_top_k": 1, "every_n_train_steps": 1}


def merged(config: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the plain `part` over it."""
    result = copy.deepcopy(dict(config))
    for key, value in part.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return result


def write(config: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(config))  # which is YAML, and takes any character


def write_good(work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write a release, its shards and an image; return the good configs of a training and of the release."""
    training = merged(CONFIG, {"data": {"params": {"training_urls": "plain"}}, "model": {"params": {"use_ema": False}}})
    release = {"model": copy.deepcopy(training["model"])}
    release["model"]["params"] |= {"cond_stage_key": "txt", "cond_stage_config": TEXT_TOWER}
    weights = fill_seeded(build_model(OmegaConf.create(release))).state_dict()
    save_state_dict(weights, work / "tiny.safetensors")
    unet = {key: 1.01 * value for key, value in weights.items() if key.startswith("model.diffusion_model.")}
    save_state_dict({**weights, **unet}, work / "tuned.safetensors")
    for name in ("good", "plain"):  # the second has no index, so that a random model trains on it and goes on
        (work / name).mkdir()
        write_set(work / name, 4, f8_shape=(8, 4, 4), t5_shape=(77, 8))
    paths = sorted((work / "good").glob("*.tar"))
    shards = [{"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths]
    write_index(work / "good", {"format": 2, "complete": True, "shards": shards, **encoder_digests(weights)})
    (work / "images").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(work / "images" / "a.png")
    (work / "images" / "a.txt").write_text("a tom")
    return training, release


def words_of(command: str, stem: str = "") -> list[str]:
    """Return the words of one of `COMMANDS`, with the configs whose names begin with `stem`."""
    return [f"{stem}{word}" if word in ("tiny.yaml", "release.yaml") else word for word in command.split()]


def forge_state(work: str, outside: str, prepared: str) -> None:
    """Name files that are not the run's own in the state of each checkpoint callback of the run `prepared`."""
    (last,) = Path(work).glob(f"{prepared}/*/checkpoints/last.ckpt")
    content = load_checkpoint(last)
    run, victims = last.parent.parent, [f"{outside}/victim.ckpt", f"{outside}/victim.txt"]
    victims += [str(next(run.glob("configs/*.yaml"))), str(last), f"{last.parent}/../../../../outside/victim.ckpt"]
    forged = 0
    for state in content["callbacks"].values():
        if "best_k_models" in state:
            import torch

            worst = torch.tensor(1e9)
            state |= {"best_k_models": dict.fromkeys(victims, worst), "kth_best_model_path": victims[0]}
            state |= {"kth_value": worst, "best_model_path": victims[0], "last_model_path": victims[1]}
            forged += 1
    assert forged == 2
    save_checkpoint(content, last)


def link_out(work: str, outside: str, prepared: str, name: str) -> None:
    """Put a link in the place of `name` in the run `prepared`: to the folder, moved elsewhere, or to a victim."""
    (run,) = Path(work).glob(f"{prepared}/*")
    elsewhere = Path(work, f"elsewhere-{prepared}")
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere if elsewhere.is_dir() else f"{outside}/victim.txt")


def resumed_commands(work: Path, outside: Path, training: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield commands that start runs, and resume them after tampering with their state or folders."""
    ranked = {"lightning": {"callbacks": {"ranked": RANKED}, "modelcheckpoint": {"params": RANKED["params"]}}}
    write(merged(training, ranked), work / "ranked-tiny.yaml")
    for name in ("state", "images", "tensorboard", "configs", "checkpoints", "csv/version_0/metrics.csv"):
        logs = f"logs-{name.replace('/', '-')}"
        train = words_of(TRAIN, "ranked-")
        train[train.index("logs")] = logs
        train += ["lightning.callbacks.image_logger.params.disabled=False"] if name == "images" else []
        yield {"name": f"before {name}", "words": train}
        prepare = ["forge_state"] if name == "state" else ["link_out"]
        prepare = [__name__, *prepare, str(work), str(outside), logs, *([] if name == "state" else [name])]
        yield {
            "name": f"resumed {name}",
            "prepare": prepare,
            "words": ["tests/hostile/resume_newest.py", logs, *["-t", "--no-test", "--max_steps", "3"]],
        }


def reading_commands(work: Path, training: Mapping[str, Any], parts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tools that read configs of other people, and never as trusted ones: a report, and the check of configs."""
    run = work / "foreign"
    for number, part in enumerate(parts.values()):
        path = run / "configs" / f"2026-01-01T00-00-{number:02}-project.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(merged(training, part), path)
    (run / "checkpoints").mkdir()
    shutil.copy(work / "tiny.safetensors", run / "checkpoints" / "last.ckpt")
    (run / "images" / "train").mkdir(parents=True)
    (run / "images" / "train" / "inputs_gs-000001_e-000000_b-000000.png").write_bytes(EPS)
    (run / "events.jsonl").write_text(json.dumps({"time": NAME, "kind": "start", "command": ["main.py", "--help"]}))
    yield {"name": "reading: report", "words": ["tools/report.py", "foreign", "--samples", "1"]}
    some = [str(path) for path in sorted(run.glob("configs/*"))[::8]]
    yield {"name": "reading: check_configs", "words": ["tools/check_configs.py", *some]}


def named_commands(work: Path) -> Iterator[dict[str, Any]]:
    """Commands on files whose names, captions, keys and metadata hold what a terminal would obey."""
    bad, images = f"b{NAME}", work / f"images{NAME}"
    images.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(images / "ok.png")
    (images / "ok.txt").write_text(f"caption{NAME}")
    (images / f"{bad}.png").write_bytes(b"no image")
    (images / f"{bad}.txt").write_text(f"caption{NAME}")
    (images / f"other{NAME}.xyz").write_text("")
    (images / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    described = work / "described"
    described.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(described / "ok.png")
    (described / "metadata.jsonl").write_text(json.dumps({"file_name": f"{bad}.png", "text": NAME}))
    weights = load_state_dict(work / "tiny.safetensors")
    save_state_dict({**weights, f"key{NAME}": weights["betas"]}, work / "keys.safetensors")
    name = NAME.encode()
    pickled = b"\x80\x04\x8c" + bytes([len(name)]) + name + b"\x8c" + bytes([len(name)]) + name + b"\x93)R."
    (work / "pickled.ckpt").write_bytes(zip_of([("data.pkl", pickled)]))
    write(json.loads((work / "tiny.yaml").read_text()), work / f"tiny{NAME}.yaml")
    (work / f"good{NAME}").mkdir()
    write_set(work / f"good{NAME}", 4, f8_shape=(8, 4, 4), t5_shape=(77, 8))
    members = [(f"k{NAME}.f8.npy", b"x"), (f"k{NAME}.t5.npy", b"x")]
    write_tar(work / "members" / "s.tar", members)
    preencode = f"tools/preencode.py {RELEASE} --size 64 --num-workers 0 --images".split()
    txt2img = f"tools/txt2img.py {RELEASE} --steps 1".split()
    lines = {
        "images": [*preencode, images.name, "--out", f"named{NAME}/%d.tar"],
        "what was left out": ["tools/inspect_shards.py", f"named{NAME}"],
        "metadata": [*preencode, "described", "--out", "described-set/%d.tar"],
        "no images": [*preencode, f"none{NAME}", "--out", "none/%d.tar"],
        "keys": [*txt2img, "--prompt", "x", "--out", "out", "--ckpt", "keys.safetensors"],
        "keys of a release": [
            "tools/hack_weights.py",
            *["--base", "tiny.yaml", "--release", "keys.safetensors", "--out", "a.ckpt"],
        ],
        "globals": ["tools/hack_weights.py", *["--base", "tiny.yaml", "--release", "pickled.ckpt", "--out", "a.ckpt"]],
        "prompt": [*txt2img, "--prompt", f"x{NAME}", "--out", f"out{NAME}"],
        "prompts": [*txt2img, "--from-file", f"none{NAME}.txt", "--out", "out"],
        "set": [*COMMANDS["evaluate"].replace("new=good", "").split(), f"new{NAME}=good{NAME}"],
        "prior": [*COMMANDS["make_prior"].split(), "--prompt", f"x{NAME}", "--batch-size", "0"],
        "shards": ["tools/inspect_shards.py", f"none{NAME}.tar"],
        "members": ["tools/inspect_shards.py", "members"],
        "config": ["tools/plan_memory.py", "--base", f"none{NAME}.yaml"],
        "override": ["tools/plan_memory.py", "--base", "tiny.yaml", f"model.{NAME}=1"],
        "merge": ["tools/merge_release.py", "--train-ckpt", f"none{NAME}.ckpt", "--release", "keys.safetensors"],
        "run": [*words_of(TRAIN.replace("tiny.yaml", "BASE")), f"data.params.training_urls=good{NAME}"],
        "resume": ["main.py", "--resume", f"none{NAME}", "-t"],
        "section": ["main.py", "-b", "tiny.yaml", "-t", f"lightning.{NAME}=1"],
        "trainer": ["main.py", "-b", "tiny.yaml", "-t", f"--max{NAME}", "1"],
    }
    lines["run"][lines["run"].index("BASE")] = f"tiny{NAME}.yaml"
    for name, words in lines.items():
        yield {"name": f"names: {name}", "words": words}
