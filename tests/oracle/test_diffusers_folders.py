"""diffusers opens the folders that we write, and predicts what we do; we open those that it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
import transformers

from ldm.checkpoint import in_memory, open_checkpoint
from ldm.checkpoint.diffusers_keys import canonical
from ldm.checkpoint.formats import same_values
from ldm.config.load import load_config
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.release.destination import Destination, save_release
from ldm.release.diffusers_config import folder_configs
from ldm.release.diffusers_writing import shapes_by_part
from ldm.release.families import FAMILIES
from ldm.release.load import load_release
from ldm.release.opening import open_release
from tests.conftest import ROOT
from tests.golden_data import relative_error, seeded_tensor
from tests.tiny_families import write_tiny

PROMPTS = ["a photo of a cat", "a drawing of a dog, with a rather long description of what it does all day"]
PIPELINES = {
    "sd1": diffusers.StableDiffusionPipeline,
    "instruct_pix2pix": diffusers.StableDiffusionInstructPix2PixPipeline,
    "sd2_768_v": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
}


class Opened(NamedTuple):
    """A folder that we wrote, as we open it and as diffusers does."""

    folder: Path
    config: Path
    ours: LatentDiffusion
    theirs: diffusers.DiffusionPipeline


@pytest.fixture(scope="module", params=PIPELINES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    folder = tmp_path_factory.mktemp(request.param)
    path, config = write_tiny(request.param, folder)
    release = open_release(path)
    save_release(release, release.weights, Destination.of(f"{folder}/written/", config))
    written = folder / "written"
    theirs = diffusers.DiffusionPipeline.from_pretrained(written)
    assert type(theirs) is PIPELINES[request.param]
    yield Opened(written, config, load_release(written, config), theirs)
    shutil.rmtree(folder)


@torch.no_grad()
def test_unet_of_the_folder(opened: Opened) -> None:
    unet = opened.ours.model.diffusion_model
    x, t = seeded_tensor("oracle/x", (2, unet.in_channels, 8, 8)), torch.tensor([3, 731])
    context = seeded_tensor("oracle/context", (2, 77, unet.context_dim))
    added: dict[str, Any] | None = None
    vector = None
    if opened.ours.model.conditioning_key.endswith("adm"):
        pooled = seeded_tensor("oracle/pooled", (2, opened.theirs.text_encoder_2.config.projection_dim))
        numbers = torch.tensor([[512.0, 768, 0, 16, 1024, 1024], [1024, 1024, 7, 0, 832, 1216]])
        embed = opened.ours.cond_stage_model.embedders[-1]
        vector = torch.cat([pooled, *(embed(pair) for pair in numbers.split(2, dim=1))], dim=1)
        added = {"text_embeds": pooled, "time_ids": numbers}
    reference = opened.theirs.unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
    found = unet(x, t, context=context) if vector is None else unet(x, t, context=context, y=vector)
    assert relative_error(found, reference) < 1e-5


@torch.no_grad()
def test_autoencoder_of_the_folder(opened: Opened) -> None:
    image = seeded_tensor("oracle/image", (1, 3, 32, 32), 0.5).clamp(-1, 1)
    posterior = opened.ours.first_stage_model.encode(image)
    assert relative_error(posterior.parameters, opened.theirs.vae.encode(image).latent_dist.parameters) < 1e-5
    z = posterior.mode()
    assert relative_error(opened.ours.first_stage_model.decode(z), opened.theirs.vae.decode(z).sample) < 1e-5
    assert opened.theirs.vae.config.scaling_factor == opened.ours.scale_factor


@torch.no_grad()
def test_text_towers_and_tokenizers_of_the_folder(opened: Opened) -> None:
    ours, theirs = opened.ours.cond_stage_model, opened.theirs
    embedders = list(getattr(ours, "embedders", [ours])[:2])
    pairs = zip(embedders, [theirs.tokenizer, getattr(theirs, "tokenizer_2", None)], strict=False)
    ids = [
        tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids for _, tokenizer in pairs
    ]
    for embedder, found in zip(embedders, ids, strict=True):
        assert torch.equal(embedder.tokenize(PROMPTS), found)
    if len(embedders) == 1:
        assert relative_error(ours.encode(PROMPTS), theirs.text_encoder(ids[0])[0]) < 1e-5
        return
    first = theirs.text_encoder(ids[0], output_hidden_states=True).hidden_states
    second = theirs.text_encoder_2(ids[1], output_hidden_states=True)
    states, pooled = embedders[1](PROMPTS)
    # Our tiny towers have two blocks each, and give the state after the first.
    assert relative_error(embedders[0](PROMPTS), first[-2]) < 1e-5
    assert relative_error(states, second.hidden_states[-2]) < 1e-5
    assert relative_error(pooled, second.text_embeds) < 1e-5


def test_scheduler_of_the_folder(opened: Opened) -> None:
    betas = opened.theirs.scheduler.betas
    assert torch.allclose(betas, opened.ours.betas.float(), rtol=1e-5)
    names = {"eps": "epsilon", "v": "v_prediction"}
    assert opened.theirs.scheduler.config.prediction_type == names[opened.ours.parameterization]


# Several shards per part, half precision as a variant, and pickles.
WRITTEN = [
    {"max_shard_size": "200KB"},
    {"variant": "fp16"},
    {"variant": "fp16", "max_shard_size": "200KB", "safe_serialization": False},
]


def test_folders_that_diffusers_writes(opened: Opened, tmp_path: Path) -> None:
    ours = open_checkpoint(opened.folder).content["state_dict"]
    for number, options in enumerate(WRITTEN if opened.folder.parent.name.startswith("sdxl0") else WRITTEN[:1]):
        opened.theirs.save_pretrained(tmp_path / str(number), **options)
        theirs = open_checkpoint(tmp_path / str(number)).content["state_dict"]
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not same_values(in_memory(ours[key]), in_memory(theirs[key]))] == []
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("key", "names"),
    [("sd1", "sd_v1"), ("sd2_base", "sd_v2"), ("sdxl", "sdxl_base"), ("sd1_inpainting", "sd_v1_inpainting")],
)
def test_configs_of_full_size(key: str, names: str) -> None:
    """diffusers and transformers build the networks of our configs with the keys and shapes of the released weights."""
    keys = json.loads((ROOT / f"tests/golden/{names}_keys.json").read_text())["keys"]
    weights = {name: torch.empty(shape, device="meta") for name, (shape, _) in keys.items()}
    shapes = shapes_by_part(weights)
    configs = folder_configs(load_config([FAMILIES[key].config]), shapes, "eps", False)
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    for part, expected in shapes.items():
        config = configs[f"{part}/config.json"]
        with torch.device("meta"):
            if part in kinds:
                model = kinds[part].from_config(config)
            else:
                model = getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))
        found = {canonical(part, name): tuple(value.shape) for name, value in model.state_dict().items()}
        found.pop("text_model.embeddings.position_ids", None)
        assert found == expected, part


@torch.no_grad()
@pytest.mark.parametrize("opened", ["sd1", "sd2_768_v"], indirect=True)
def test_samples_of_the_folder(opened: Opened) -> None:
    """The whole pipeline, with its scheduler, tokenizer and guidance, makes the latents that our sampler makes."""
    ours, x_T = opened.ours, seeded_tensor("oracle/x_T", (1, 4, 8, 8))
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 64, "width": 64}
    theirs = opened.theirs(PROMPTS[0], latents=x_T, output_type="latent", **options).images
    guided = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": ours.get_learned_conditioning([""])}
    cond = ours.get_learned_conditioning(PROMPTS[:1])
    found, _ = DDIMSampler(ours).sample(5, 1, (4, 8, 8), conditioning=cond, x_T=x_T, verbose=False, **guided)
    assert relative_error(found, theirs) < 1e-4
