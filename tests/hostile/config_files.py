"""Configs that are broken, absurd, or would run what they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.hostile.damage import Corpus, damaged, mistaken


def configs(marker: Path) -> Corpus:
    yield from mistaken()
    good = b"model:\n  base_learning_rate: 1.0e-4\n  target: torch.nn.Linear\n"
    good += b"  params: &p {in_features: 2, out_features: 3}\n"
    good += b"data:\n  params: {x: *p, y: '${model.params.in_features}'}\n"
    yield from damaged(good, "yaml", 40)
    touch = f"touch {marker}"
    for number, text in enumerate(
        (
            f"model: !!python/object/apply:os.system ['{touch}']",
            f"model: {{x: !!python/object/new:os.system ['{touch}']}}",
            "model: {x: !!python/name:os.system }",
            "model: {x: !!python/module:os }",
            f"model: {{target: os.system, params: {{command: '{touch}'}}}}",
            f"model: {{target: subprocess.Popen, params: {{args: '{touch}', shell: true}}}}",
            f"data: {{params: {{training_urls: 'pipe:{touch}'}}}}",
            "model: {x: !!int y}",
            "model: {x: !!float y}",
            "model: {x: !!bool y}",
            "model: {x: !!timestamp y}",
            "model: {x: !!binary '*'}",
            "model: {x: !!set {a, b}}",
            "model: {x: !!omap [a: 1]}",
            "model: {x: =}",
            "model: {x: " + "9" * 5000 + "}",
            "model: {x: 1e999}",
            "model: {? [a] : b}",
            "model: {<<: 3}",
            "model: {<<: *x}",
            "model: &a {x: *a}",
            "model: {x: '${model.x}'}",
            "model: {x: '${'}",
            "model: {x: '${x:}'}",
            "model: {x: '${..}'}",
            "model: {x: '${oc.env:NONE_OF_THIS_NAME}'}",
            "model: {x: '${oc.env:HOME}'}",
            "model: {x: '${oc.decode:${oc.env:HOME}}'}",
            "data: {params: {training_urls: 'http://127.0.0.1:9/a.tar'}}",
            f"data: {{params: {{training_urls: '{{p,q}}ipe:{touch}'}}}}",
            f"data: {{params: {{training_urls: '{{pipe:{touch}'}}}}",
            'model: {"target": "torch.nn.\\u001b[31mLinear\\n\\u202e"}',
            "model: {\"a\\u001b[2J\\nb\": '${nowhere}'}",
            '"mod\\u0007el\\n": {}',
            "model: " + "[" * 3000 + "]" * 3000,
            "model: " + "{a: " * 3000 + "}" * 3000,
            "model: {x: '" + "${a" * 3000 + "}" * 3000 + "'}",
            "? a\n? b\n",
            "--- {}\n--- {}\n",
            "%YAML 9.9\n---\nmodel: {}",
            "1: 2",
            "null: {}",
            "model: 3",
            "data: []",
            "model: {target: 3}",
            "model: {target: [a]}",
            "model: {target: ..x}",
            "model: {target: torch.nn.Identity, params: 3}",
            "data: {params: [a]}",
            "lightning: {logger: {params: a}}",
        )
    ):
        yield f"text-{number}", text.encode()
    yield (
        "aliases",
        ("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))).encode(),
    )
    yield (
        "merges",
        ("a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))).encode(),
    )
    strings = "".join(f"  x{i}: '${{.x{i - 1}}}${{.x{i - 1}}}'\n" for i in range(1, 60))
    yield "interpolations", ("model:\n  x0: lol\n" + strings).encode()
    yield "chain", ("model:\n" + "".join(f"  x{i}: ${{.x{i + 1}}}\n" for i in range(3000)) + "  x3000: 1\n").encode()
    yield "large", b"model: {x: " + b"a" * (1 << 21) + b"}"
    yield "braces", b"data: {params: {training_urls: 'http:{0..99999999999}'}}"


def _nested(path: str, value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` for the path `a.b`."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def untrusted(marker: Path) -> dict[str, dict[str, Any]]:
    """Return parts of configs by name, each of which makes a good config ask for trust.

    A payload that ran would make `marker`.
    """
    touch, part = f"touch {marker}", "model.params.first_stage_config.params.lossconfig"
    jinaai = {"target": "torchmetrics.multimodal.clip_score.CLIPScore", "params": {"model_name_or_path": "x-jinaai-x"}}
    found = {
        f"target {target}": _nested(f"{part}.target", target)
        for target in (
            *("os.system", "subprocess.Popen", "builtins.eval", "evil.Thing", "antigravity.webbrowser", "this.s"),
            *("torch.load", "torch.hub.load", "torch.nn.DataParallel", "torch.utils.cpp_extension.load_inline"),
            *("torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler", "torch.__main__.x"),
            *("ldm.cli.run.call", "ldm.shards.writer.ShardWriter", "ldm.util.importlib", "ldm.files.atomic_write"),
            *("transformers.pipeline", "transformers.AutoModel", "torchmetrics.image.fid.FrechetInceptionDistance"),
            *("pytorch_lightning.loggers.WandbLogger", "pytorch_lightning.loggers.MLFlowLogger", "idlelib.idle.x"),
            *("", "...", "os.system\n", "OS.SYSTEM", "torch.nn.Identity\u001b[31m"),
        )
    }
    found |= {
        f"command {text[:20]!r}": _nested("data.params.val_urls", text)
        for text in (
            *(f"pipe:{touch}", f"PIPE:{touch}", f" pipe:{touch}", f"p\nipe:{touch}", f"file:pipe:{touch}"),
            *(f"good::pipe:{touch}", f"{{p,q}}ipe:{touch}", f"{{pi,x}}{{pe:{touch},y}}", f"{{pipe:{touch}"),
            *(f"\\pipe:{touch}", f"!{touch}", f"|{touch}", f"{{0..99999999}}{{p,q}}ipe:{touch}", f"\uff50ipe:{touch}"),
        )
    }
    found |= {
        f"url at {path}": _nested(path, url)
        for path, url in {
            "data.params.val_urls": "http://127.0.0.1:9/a.tar",
            "data.params.test_urls": ["good", "s3://bucket/a.tar"],
            "data.params.training_urls": "good::gs:bucket/a.tar",
            "data.params.null_cond_path": "hf://a/b.npy",
            "model.params.ckpt_path": "https://127.0.0.1:9/a.ckpt",
            "lightning.logger.params.save_dir": "memory://logs",
            "lightning.logger.params.host": "http://127.0.0.1:9",
            "lightning.modelcheckpoint.params.dirpath": "s3://bucket/a",
            "lightning.callbacks.a": {"target": "main.CUDACallback", "params": {"http://127.0.0.1:9": 1}},
        }.items()
    }
    found |= {
        f"environment {text}": _nested("lightning.logger.params.name", text)
        for text in (
            *("${oc.env:HOME}", "${oc.env:HOME,x}", "x/${oc.env:USER,y}", "${oc.decode:${oc.env:HOME}}", "$HOME"),
            *(
                "${oc.create:{a: 1}}",
                "${oc.select:model.target}",
                "${mine:1}",
                "${model.${data.target}}",
                "\\${oc.env:HOME}",
            ),
        )
    }
    return found | {
        "a metric that runs the code of a folder": _nested(part, jinaai),
        "a command among the keys": _nested("lightning.callbacks.a.params", {f"pipe:{touch}": 1}),
        "a target of another framework": _nested("data.params._target_", "os.system"),
        "a target in a list": _nested("data.params.test_urls", [{"target": "os.system", "params": {"command": touch}}]),
        "a target made of parts": {
            **_nested("data.params.val_urls", "os"),
            **_nested(f"{part}.target", "${data.params.val_urls}.system"),
        },
        "a command made of parts": {"data": {"params": {"val_urls": "p", "test_urls": "${.val_urls}ipe:" + touch}}},
        "an interpolation made of parts": {
            **_nested("data.params.val_urls", "$"),
            **_nested("lightning.logger.params.name", "${data.params.val_urls}{oc.env:HOME}"),
        },
        "an upload": _nested("lightning.trainer.model_registry", "mine/model"),
    }


def placed_outside(outside: Path) -> dict[str, dict[str, Any]]:
    """Return parts of configs by name, each of which would make a training write into the folder `outside`."""
    lightning, up = "pytorch_lightning", f"../../../{outside.name}"

    def callback(target: str, **params: Any) -> dict[str, Any]:
        return _nested("lightning.callbacks.a", {"target": target, "params": params})

    def logger(target: str = f"{lightning}.loggers.TensorBoardLogger", **params: Any) -> dict[str, Any]:
        return _nested("lightning.logger", {"target": target, "params": params})

    checkpoint, keep = f"{lightning}.callbacks.ModelCheckpoint", {"every_n_train_steps": 1, "save_top_k": -1}
    kept = "lightning.modelcheckpoint.params"
    folders = {name: f"{outside}/{name}" for name in ("logdir", "ckptdir", "cfgdir")}
    return {
        "filename up": _nested(kept, {"monitor": None, **keep, "filename": f"{up}/x"}),
        "filename absolute": _nested(kept, {"monitor": None, **keep, "filename": f"{outside}/x"}),
        "filename up, after a metric": _nested(kept, {"monitor": None, **keep, "filename": f"{{epoch}}/../{up}/x"}),
        "callback dirpath": callback(checkpoint, dirpath=str(outside), **keep),
        "callback dirpath up": callback(checkpoint, dirpath=f"../{outside.name}", **keep),
        "configs by name": callback(
            "main.SetupCallback", now=up, config={}, lightning_config={}, logdir="logs", ckptdir="logs", cfgdir="logs"
        ),
        "callback filename": callback(checkpoint, filename=f"{up}/x", **keep),
        "callback last": callback(checkpoint, dirpath=str(outside), save_last="link"),
        "on an exception": callback(f"{lightning}.callbacks.OnExceptionCheckpoint", dirpath=str(outside)),
        "configs": callback("main.SetupCallback", now="x", config={}, lightning_config={}, **folders),
        "last.ckpt": callback("ldm.callbacks.checkpoints.LastCheckpoint", path=f"{outside}/last.ckpt", requests=1),
        "default_root_dir": _nested("lightning.trainer.default_root_dir", str(outside)),
        "logger save_dir": logger(save_dir=str(outside)),
        "logger save_dir up": logger(save_dir=f"../{outside.name}"),
        "logger name": logger(name=up),
        "logger version": logger(version=f"../{up}"),
        "logger sub_dir": logger(sub_dir=f"../{up}"),
        "logger suffix": logger(filename_suffix=f"/../{up}/x"),
        "csv logger": logger(f"{lightning}.loggers.CSVLogger", save_dir=str(outside)),
        "a null character": logger(name="a\0b"),
    }


def placed_inside(outside: Path) -> dict[str, dict[str, Any]]:
    """Return parts of configs by name that name `outside` where a run uses its own folder, and writes nothing there."""
    return {
        "weights_save_path": _nested("lightning.trainer.weights_save_path", str(outside)),
        "dirpath": _nested("lightning.modelcheckpoint.params.dirpath", str(outside)),
        "profiler": _nested("lightning.trainer.profiler", "simple"),
    }
