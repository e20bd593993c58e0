"""Classes that an untrusted config may name, each with the reason. This module imports none of them.

The list names classes, because no whole package is safe. torch and transformers have classes that start processes,
torchmetrics has a class that runs code from a model's folder, and some modules do harm on import.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ldm.lr_scheduler import TORCH_SCHEDULES

_ROOT = Path(__file__).resolve().parents[2]


class Allowed(NamedTuple):
    """Classes of one module, and the reason why building them with any `params` is safe."""

    module: str
    names: tuple[str, ...]
    reason: str


_LAYERS = """
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d AlphaDropout
AvgPool1d AvgPool2d AvgPool3d BCELoss BCEWithLogitsLoss BatchNorm1d BatchNorm2d BatchNorm3d Bilinear CELU CTCLoss
ChannelShuffle CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d Conv1d Conv2d Conv3d
ConvTranspose1d ConvTranspose2d ConvTranspose3d CosineEmbeddingLoss CosineSimilarity CrossEntropyLoss CrossMapLRN2d
Dropout Dropout1d Dropout2d Dropout3d ELU Embedding EmbeddingBag FeatureAlphaDropout Flatten Fold FractionalMaxPool2d
FractionalMaxPool3d GELU GLU GRU GRUCell GaussianNLLLoss GroupNorm Hardshrink Hardsigmoid Hardswish Hardtanh
HingeEmbeddingLoss HuberLoss Identity InstanceNorm1d InstanceNorm2d InstanceNorm3d KLDivLoss L1Loss LPPool1d LPPool2d
LPPool3d LSTM LSTMCell LayerNorm LeakyReLU Linear LocalResponseNorm LogSigmoid LogSoftmax MSELoss MarginRankingLoss
MaxPool1d MaxPool2d MaxPool3d Mish MultiLabelMarginLoss MultiLabelSoftMarginLoss MultiMarginLoss MultiheadAttention
NLLLoss PReLU PairwiseDistance PixelShuffle PixelUnshuffle PoissonNLLLoss RMSNorm RNN RNNCell RReLU ReLU ReLU6
ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d SELU SiLU Sigmoid
SmoothL1Loss SoftMarginLoss Softmax Softmax2d Softmin Softplus Softshrink Softsign SyncBatchNorm Tanh Tanhshrink
Threshold Transformer TransformerEncoderLayer TransformerDecoderLayer TripletMarginLoss Unflatten Unfold Upsample
UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad2d ZeroPad3d
"""
_LIGHTNING = ("pytorch_lightning", "lightning.pytorch")

_MODELS = "network: computes, and reads local weight files"
_OUR_DATA = "data set: reads local files; streams need URLs, and URLs need trust"
_OUR_CALLBACKS = "callback: writes only in the run folder, and checks its paths"
_COMPUTES = "computes: no file, no process, no network"

# Packages of this project whose classes configs may name. Classes of other packages may write to any given path.
OWN_PACKAGES = {
    "ldm.models": _MODELS,
    "ldm.modules": _MODELS,
    "ldm.data": _OUR_DATA,
    "ldm.images": "image transform: computes",
    "ldm.callbacks": _OUR_CALLBACKS,
    "ldm.optim": _COMPUTES,
    "ldm.lr_scheduler": _COMPUTES,
}

ALLOWED = (
    Allowed("main", ("DataModuleFromConfig", "WebDataNpyModuleFromConfig"), _OUR_DATA),
    Allowed("main", ("SetupCallback", "ImageLogger", "CUDACallback"), _OUR_CALLBACKS),
    Allowed("torch.nn", tuple(_LAYERS.split()), "layer or loss: computes, and refers to no other object by name"),
    Allowed(
        "torch.optim",
        (
            *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam"),
            *("RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam"),
        ),
        "optimizer: " + _COMPUTES,
    ),
    Allowed(
        "torchao.optim",
        ("Adam4bit", "Adam8bit", "AdamFp8", "AdamW4bit", "AdamW8bit", "AdamWFp8"),
        "low-bit optimizer: " + _COMPUTES,
    ),
    Allowed(
        "pytorch_optimizer",
        ("CAME", "Lion", "Prodigy", "ScheduleFreeAdamW"),
        "optimizer: " + _COMPUTES,
    ),
    Allowed("torch.optim.lr_scheduler", TORCH_SCHEDULES, "schedule: " + _COMPUTES),
    Allowed("transformers.optimization", ("Adafactor",), "optimizer: " + _COMPUTES),
    Allowed(
        "torchmetrics.image",
        ("PeakSignalNoiseRatio", "StructuralSimilarityIndexMeasure", "MultiScaleStructuralSimilarityIndexMeasure"),
        "metric of images without weights: " + _COMPUTES,
    ),
    Allowed(
        "torchmetrics",
        ("MeanAbsoluteError", "MeanMetric", "MeanSquaredError"),
        "metric of numbers: " + _COMPUTES,
    ),
    *(
        allowed
        for lightning in _LIGHTNING
        for allowed in (
            Allowed(
                f"{lightning}.callbacks",
                (
                    *("BackboneFinetuning", "DeviceStatsMonitor", "EMAWeightAveraging", "EarlyStopping"),
                    *("GradientAccumulationScheduler", "LearningRateMonitor", "ModelSummary", "RichModelSummary"),
                    *("RichProgressBar", "StochasticWeightAveraging", "TQDMProgressBar", "Timer"),
                ),
                "callback that counts, displays or averages: writes no file",
            ),
            Allowed(
                f"{lightning}.callbacks",
                ("ModelCheckpoint", "OnExceptionCheckpoint"),
                "checkpoint callback: dirpath, filename, and each write and removal must be in the run folder",
            ),
            Allowed(
                f"{lightning}.loggers",
                ("CSVLogger", "TensorBoardLogger"),
                "file logger: its folder must be in the run folder",
            ),
            Allowed(
                f"{lightning}.strategies", ("DDPStrategy",), "strategy: distributes the work over the given devices"
            ),
        )
    ),
    Allowed("pytorch_lightning.loggers", ("TestTubeLogger",), "name of 2022: replaced by TensorBoardLogger"),
    Allowed("pytorch_lightning.plugins", ("DDPPlugin",), "name of 2022: replaced by DDPStrategy"),
)
_REASONS = {f"{allowed.module}.{name}": allowed.reason for allowed in ALLOWED for name in allowed.names}


def reason_for(target: str) -> str | None:
    """Return the reason why the dotted path `target` needs no trust, or None if it needs trust."""
    if target in _REASONS:
        return _REASONS[target]
    package = _package_of(target)
    module, _, name = target.rpartition(".")
    return OWN_PACKAGES[package] if package and _is_own_class(module, name, frozenset()) else None


def nearest_allowed(target: str) -> str:
    """Return `"; did you mean 'x'?"` for the allowed class with the most similar name, or an empty string."""
    module = target.rpartition(".")[0]
    known = [*_REASONS, *(f"{module}.{name}" for name in (_bindings(module) if _package_of(target) else ()))]
    close = (name for name in difflib.get_close_matches(target, known, n=3, cutoff=0.9) if reason_for(name))
    found = next(close, None)
    return f"; did you mean {found!r}?" if found else ""


def _package_of(target: str) -> str | None:
    return next((package for package in OWN_PACKAGES if target.startswith(f"{package}.")), None)


def _is_own_class(module: str, name: str, seen: frozenset[tuple[str, str]]) -> bool:
    """Return True if `name` in `module` is a class that a module of `OWN_PACKAGES` defines."""
    if (module, name) in seen or _package_of(f"{module}.{name}") is None:
        return False
    bound = _bindings(module).get(name)
    if isinstance(bound, tuple):
        return _is_own_class(*bound, seen | {(module, name)})
    return bound == "class"


@cache
def _bindings(module: str) -> dict[str, str | tuple[str, str]]:
    """Return the kind of each top-level name of a module, from its source text.

    The kind is `"class"` for a class, (module, name) for an imported name, and `"other"` for anything else.
    """
    path = _ROOT.joinpath(*module.split("."))
    file = next((found for found in (path / "__init__.py", path.with_suffix(".py")) if found.is_file()), None)
    if file is None:
        return {}
    found: dict[str, str | tuple[str, str]] = {}
    for statement in _top_level(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(statement, ast.ClassDef):
            found[statement.name] = "class"
        elif isinstance(statement, ast.ImportFrom) and statement.level == 0 and statement.module:
            for alias in statement.names:
                found[alias.asname or alias.name] = (statement.module, alias.name)
        else:
            found |= dict.fromkeys(_bound_by(statement, module), "other")
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
                found |= {t.id: (module, statement.value.id) for t in statement.targets if isinstance(t, ast.Name)}
    return found


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the top-level statements of a module.

    A `try` is replaced by the statements of its body and handlers. An `if` is yielded whole: its condition is unknown.
    """
    for statement in body:
        if isinstance(statement, ast.Try):
            yield from _top_level([*statement.body, *(part for h in statement.handlers for part in h.body)])
        else:
            yield statement


def _bound_by(statement: ast.stmt, module: str) -> set[str]:
    """Return the names that a statement binds, none of which is known to be a class."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return {statement.name}
    nodes = list(ast.walk(statement))
    aliases = (alias for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names)
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {(alias.asname or alias.name).partition(".")[0] for alias in aliases}
