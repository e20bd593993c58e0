"""Tests of all configs: targets exist, params fit them, and release configs give the released keys."""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoint.keys import SCHEDULE_KEYS, UNET
from ldm.config.load import build_model, load_config, plain
from ldm.release.families import FAMILIES
from ldm.release.initialisation import without_initialisation
from ldm.release.recognition import recognise
from ldm.util import UserError, check_params, get_obj_from_str, instantiate_from_config
from tests.golden_data import RELEASED

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
OVER_RELEASE = ("encode_captions.yaml", "textual_inversion.yaml")
# Each is laid over a config that trains; the last ones over a release's.
OVERLAYS = (
    *("fast.yaml", "lean.yaml", "minimal.yaml", "smallest.yaml", "prior_images.yaml", "prior_teacher.yaml"),
    *("lora.yaml", "decay_to_start.yaml", "pull_to_start.yaml", "keep.yaml", "watch_forgetting.yaml", *OVER_RELEASE),
)
TIERS = ("fast.yaml", "lean.yaml", "minimal.yaml", "smallest.yaml")
REFUSED = {
    (streamed, resident): "use_checkpoint: set it to false; StreamedUNetModel checkpoints whole layers"
    for streamed in ("minimal.yaml", "smallest.yaml")
    for resident in ("fast.yaml", "lean.yaml")
}
REFUSED["lora.yaml", "textual_inversion.yaml"] = (
    "lora trains factors in place of weights, and unet_trainable: False selects weights"
)
# Families without a list: the one that theirs differs from in the first convolution, and a depth network's keys.
SIBLINGS = {"sd2_inpainting": "sd_v2", "sd2_depth": "sd_v2", "sdxl_inpainting": "sdxl_base"}
FIRST, DEPTH = f"{UNET}input_blocks.0.0.weight", "depth_model."
# Tiers set the same keys, so that their order matters.
PAIRS = [*permutations(TIERS, 2), *(pair for pair in combinations(OVERLAYS, 2) if not {*pair} <= {*TIERS})]
RECIPES = [family.finetune_config for family in FAMILIES.values()]
KEYS = ROOT / "tests" / "golden" / "sd_v1_keys.json"


def described(node: Any, where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every mapping with a `target` below `node`, with its path."""
    if isinstance(node, Mapping):
        if "target" in node:
            yield where, node
        for key, value in node.items():
            yield from described(value, f"{where}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from described(value, f"{where}[{index}]")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_targets_resolve_and_params_bind(path):
    for where, entry in described(plain(load_config([path]))):
        more = {"input_key", "is_trainable"} if ".emb_models[" in where else {"base_learning_rate"}
        assert set(entry) <= {"target", "params", *more}, where
        check_params(entry["target"], get_obj_from_str(entry["target"]), entry.get("params") or {})


# A third of the pairs: each overlay over three recipes, each recipe under three overlays or more.
OVER_RECIPES = [
    (recipe, overlay)
    for row, recipe in enumerate(RECIPES)
    for column, overlay in enumerate(name for name in OVERLAYS if name not in OVER_RELEASE)
    if (row + column) % 3 == 0
]


@pytest.mark.parametrize(("recipe", "overlay"), OVER_RECIPES)
def test_overlays_bind_on_top_of_the_recipes(recipe, overlay):
    merged = plain(load_config([recipe, overlay]))
    for _, entry in described(merged):
        check_params(entry["target"], get_obj_from_str(entry["target"]), entry.get("params") or {})
    assert merged["model"]["params"]["unet_config"]["params"]["model_channels"] == 320


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_tiers_make_a_model_of_every_recipe(recipe):
    """Every tier over one recipe of each kind of network, and two over their siblings, one with each class of UNet."""
    expected = None
    is_sibling = recipe.endswith(("inpainting.yaml", "pix2pix.yaml", "v2_base.yaml"))
    for tiers in ([], *([tier] for tier in (TIERS[1::2] if is_sibling else TIERS))):
        with torch.device("meta"):
            model = build_model(load_config([recipe, *tiers]))
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        expected = expected or shapes
        assert shapes == expected, tiers
        model.learning_rate = 1e-5
        model.configure_optimizers()


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(pair).replace(".yaml", ""))
def test_two_overlays_combine_or_are_refused_with_a_reason(pair):
    base = "demo_tiny_release.yaml" if {*pair} & {*OVER_RELEASE} else "demo_tiny.yaml"
    config = load_config([base, *pair])
    for _, entry in described(plain(config)):
        check_params(entry["target"], get_obj_from_str(entry["target"]), entry.get("params") or {})
    for described_callback in plain(config.lightning.callbacks).values():
        instantiate_from_config(described_callback)
    if pair in REFUSED:
        with pytest.raises(UserError, match=REFUSED[pair]):
            build_model(config)
        return
    with without_initialisation():
        model = build_model(config)
    model.learning_rate = 1e-3
    model.configure_optimizers()


def test_the_last_tier_takes_precedence():
    def optimizer(*names):
        return plain(load_config(["finetune_stable_diffusion.yaml", *names]).model.params.optimizer_config)

    for other in ("lean.yaml", "smallest.yaml"):
        assert optimizer(other, "minimal.yaml") == optimizer("minimal.yaml")
    for other in ("fast.yaml", "minimal.yaml", "decay_to_start.yaml"):
        assert optimizer(other, "lean.yaml") == optimizer("lean.yaml")
        assert optimizer(other, "smallest.yaml") == optimizer("smallest.yaml")
    assert optimizer("lean.yaml", "smallest.yaml") == optimizer("smallest.yaml")
    assert optimizer("lean.yaml", "decay_to_start.yaml") == optimizer("lean.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_names_its_launch_commands(path):
    header = re.split(r"\n(?=\w+:)", path.read_text())[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert path.name in header and "python " in header


def test_the_demo_is_small():
    model = build_model(load_config(["demo_tiny_release.yaml"]))
    assert sum(parameter.numel() for parameter in model.parameters()) < 12.5e6  # 25 MB in float16


def test_the_demo_release_has_what_the_demo_trains():
    trained, released = (build_model(load_config([name])) for name in ("demo_tiny.yaml", "demo_tiny_release.yaml"))
    shapes = {key: value.shape for key, value in released.state_dict().items()}
    own = {key: value.shape for key, value in trained.state_dict().items() if not key.startswith("model_ema.")}
    assert own.items() <= shapes.items()
    assert {key.partition(".")[0] for key in shapes.keys() - own.keys()} == {"cond_stage_model"}


@pytest.mark.parametrize("release", ["stable_diffusion_v1.yaml", "demo_tiny_release.yaml"])
def test_textual_inversion_is_an_overlay_for_a_release(release):
    with torch.device("meta"):
        model, released = (
            build_model(load_config(names)) for names in ([release, "textual_inversion.yaml"], [release])
        )
    own, expected = ({key: value.shape for key, value in m.state_dict().items()} for m in (model, released))
    assert own == expected
    [row] = model.trained_parameters()
    assert row.shape == (model.model.diffusion_model.context_dim,)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_release_configs_agree_with_FAMILIES(family):
    with torch.device("meta"):
        model = build_model(load_config([family.config]))
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert recognise(own, parameterization=family.parameterization) == family
    assert model.model.conditioning_key == family.conditioning_key
    assert (model.parameterization, model.scale_factor) == (family.parameterization, family.scale)
    assert (model.image_size * family.factor, model.channels) == (family.size, family.channels)
    assert model.first_stage_model.downsampling == family.factor
    assert any(key.startswith(family.encoders) for key in own)
    assert ("label_emb" in str(model.model.diffusion_model)) == family.has_vector
    name = RELEASED.get(family.key) or SIBLINGS[family.key]
    released = json.loads((KEYS.parent / f"{name}_keys.json").read_text())["keys"]
    expected = {key: tuple(shape) for key, (shape, _) in released.items() if not key.endswith("position_ids")}
    if family.key in SIBLINGS:
        expected[FIRST] = (320, family.in_channels, 3, 3)
        own = {key: shape for key, shape in own.items() if not key.startswith(DEPTH)}
    if not expected.keys() & set(SCHEDULE_KEYS):  # SDXL's list has no schedule
        own = {key: shape for key, shape in own.items() if key not in SCHEDULE_KEYS}
    assert own == expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_finetune_configs_of_FAMILIES_train_the_released_UNet(recipe):
    [family] = [family for family in FAMILIES.values() if family.finetune_config == recipe]
    params, released = (
        plain(load_config([name]))["model"]["params"] for name in (family.finetune_config, family.config)
    )
    own = ("first_stage_key", "cond_stage_key", "cond_stage_config", "depth_stage_config", "monitor")
    params["first_stage_config"]["params"].pop("monitor")
    assert {key: value for key, value in params.items() if key not in own} == {
        key: value for key, value in released.items() if key not in own
    }
    with torch.device("meta"):
        model = build_model(load_config([recipe]))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert recognise(shapes, parameterization=model.parameterization) == family
    model.check_batch_shapes({"f8": (8, family.size // 8, family.size // 8), "t5": (77, family.layout.context)})


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_all_FAMILIES_have_the_same_first_stage(family):
    params = plain(load_config([family.config]))["model"]["params"]
    first = plain(load_config([FAMILIES["sd1"].config]))["model"]["params"]
    assert params["first_stage_config"] == first["first_stage_config"]


@pytest.mark.parametrize(
    ("name", "has_text_tower"),
    [("stable_diffusion_v1.yaml", True), ("train_from_images.yaml", True), ("finetune_stable_diffusion.yaml", False)],
)
def test_the_full_size_models_have_the_released_keys(name, has_text_tower):
    with torch.device("meta"):
        model = build_model(load_config([name]))
    own = {key: list(value.shape) for key, value in model.state_dict().items()}
    optional = ("model_ema.", "cond_stage_model.transformer.text_model.embeddings.position_ids")
    released = {
        key: shape
        for key, (shape, _) in json.loads(KEYS.read_text())["keys"].items()
        if not key.startswith(optional) and (has_text_tower or not key.startswith("cond_stage_model."))
    }
    assert own == released


def test_the_recipe_is_the_contracts():
    """The values that people have in their own copies."""
    config = plain(load_config(["finetune_stable_diffusion.yaml"]))
    params = config["model"]["params"]
    assert config["model"]["base_learning_rate"] == 6.666e-08
    assert (params["first_stage_key"], params["cond_stage_key"], params["use_ema"]) == ("f8", "t5", False)
    assert (params["monitor"], params["scale_factor"]) == ("val/loss_simple_ema", 0.18215)
    assert {"training_urls", "val_urls", "test_urls", "null_cond_dropout"} <= set(config["data"]["params"])


def test_the_lean_tier_lies_over_the_recipe():
    config = plain(load_config(["finetune_stable_diffusion.yaml", "lean.yaml"]))
    for _, entry in described(config):
        check_params(entry["target"], get_obj_from_str(entry["target"]), entry.get("params") or {})
    assert config["model"]["params"]["optimizer_config"]["target"] == "ldm.optim.InBackward"
    assert config["model"]["params"]["unet_config"]["params"]["use_checkpoint"] is True
    assert config["lightning"]["trainer"] == {
        "accumulate_grad_batches": 1,
        "max_steps": 10000,
        "precision": "bf16-true",
    }
