"""The classes that a config may name without being trusted, each with the reason. Imports none of them.

Whole packages are no such list: torch and transformers have classes that start processes, torchmetrics has one that
runs the code of a model's folder, and some modules do harm when they are imported.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).resolve().parents[2]


class Allowed(NamedTuple):
    """Classes of one module, and why building one of them with any `params` is safe."""

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

_MODELS = "a network: it computes, and reads only the local files of weights that it is given"
_OUR_DATA = "a data set: it reads local files; what opens streams is given URLs, which need trust themselves"
_OUR_CALLBACKS = "a callback: it writes in the run folder alone, where its folders are checked"
_COMPUTES = "it computes: no file, no process, no network"

# Rooms of this package whose classes configs name. In every other room a class may write where it is told to.
OWN_ROOMS = {
    "ldm.models": _MODELS,
    "ldm.modules": _MODELS,
    "ldm.data": _OUR_DATA,
    "ldm.images": "a transform of an image: it computes",
    "ldm.callbacks": _OUR_CALLBACKS,
    "ldm.optim": _COMPUTES,
    "ldm.lr_scheduler": _COMPUTES,
}

ALLOWED = (
    Allowed("main", ("DataModuleFromConfig", "WebDataNpyModuleFromConfig"), _OUR_DATA),
    Allowed("main", ("SetupCallback", "ImageLogger", "CUDACallback"), _OUR_CALLBACKS),
    Allowed("torch.nn", tuple(_LAYERS.split()), "a layer or a loss: it computes, and holds no other object by name"),
    Allowed(
        "torch.optim",
        (
            *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam"),
            *("RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam"),
        ),
        "an optimizer: " + _COMPUTES,
    ),
    Allowed(
        "torchao.optim",
        ("Adam4bit", "Adam8bit", "AdamFp8", "AdamW4bit", "AdamW8bit", "AdamWFp8"),
        "an optimizer with low-bit state: " + _COMPUTES,
    ),
    Allowed("transformers.optimization", ("Adafactor",), "an optimizer: " + _COMPUTES),
    Allowed(
        "torchmetrics.image",
        ("PeakSignalNoiseRatio", "StructuralSimilarityIndexMeasure", "MultiScaleStructuralSimilarityIndexMeasure"),
        "a metric of pixels, without weights to fetch: " + _COMPUTES,
    ),
    Allowed(
        "torchmetrics",
        ("MeanAbsoluteError", "MeanMetric", "MeanSquaredError"),
        "a metric of numbers, without weights to fetch: " + _COMPUTES,
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
                "a callback that counts, shows or averages: it writes no file",
            ),
            Allowed(
                f"{lightning}.callbacks",
                ("ModelCheckpoint", "OnExceptionCheckpoint"),
                "checkpoints: dirpath and filename are held to the run folder, and so is each write and removal",
            ),
            Allowed(
                f"{lightning}.loggers",
                ("CSVLogger", "TensorBoardLogger"),
                "writes to files alone, and its folder is held to the run folder",
            ),
            Allowed(f"{lightning}.strategies", ("DDPStrategy",), "divides the work among the devices asked for"),
        )
    ),
    Allowed("pytorch_lightning.loggers", ("TestTubeLogger",), "of 2022: TensorBoardLogger takes its place"),
    Allowed("pytorch_lightning.plugins", ("DDPPlugin",), "of 2022: DDPStrategy takes its place"),
)
_REASONS = {f"{allowed.module}.{name}": allowed.reason for allowed in ALLOWED for name in allowed.names}


def reason_for(target: str) -> str | None:
    """Return why `target`, a dotted path, needs no trust; None where it does."""
    if target in _REASONS:
        return _REASONS[target]
    room = _room_of(target)
    module, _, name = target.rpartition(".")
    return OWN_ROOMS[room] if room and _is_own_class(module, name, frozenset()) else None


def nearest_allowed(target: str) -> str:
    """Return `"; did you mean 'x'?"` for a class on the list spelt almost as `target`, or the empty string."""
    module = target.rpartition(".")[0]
    known = [*_REASONS, *(f"{module}.{name}" for name in (_bindings(module) if _room_of(target) else ()))]
    close = (name for name in difflib.get_close_matches(target, known, n=3, cutoff=0.9) if reason_for(name))
    found = next(close, None)
    return f"; did you mean {found!r}?" if found else ""


def _room_of(target: str) -> str | None:
    return next((room for room in OWN_ROOMS if target.startswith(f"{room}.")), None)


def _is_own_class(module: str, name: str, seen: frozenset[tuple[str, str]]) -> bool:
    """Whether `name` in the module of this package is a class that a module of `OWN_ROOMS` defines."""
    if (module, name) in seen or _room_of(f"{module}.{name}") is None:
        return False
    bound = _bindings(module).get(name)
    if isinstance(bound, tuple):
        return _is_own_class(*bound, seen | {(module, name)})
    return bound == "class"


@cache
def _bindings(module: str) -> dict[str, str | tuple[str, str]]:
    """What the names at the top level of a module of this package are, read from its text.

    A class is `"class"`, a name from elsewhere the module and the name that it has there, anything else `"other"`.
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
    """Yield the statements that run when the module is imported, except those within `if`, whose outcome is unknown."""
    for statement in body:
        if isinstance(statement, ast.Try):
            yield from _top_level([*statement.body, *(part for h in statement.handlers for part in h.body)])
        else:
            yield statement


def _bound_by(statement: ast.stmt, module: str) -> set[str]:
    """The names that a statement binds, of which none is known to be a class."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return {statement.name}
    nodes = list(ast.walk(statement))
    aliases = (alias for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names)
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {(alias.asname or alias.name).partition(".")[0] for alias in aliases}
