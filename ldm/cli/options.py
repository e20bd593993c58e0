"""Command line options shared by the tools that sample images. Imports no torch."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ldm.cli.paths import check_release
from ldm.models.diffusion.samplers import SAMPLERS
from ldm.modules.encoders.caption_settings import check_caption_options
from ldm.release import CONVENTIONAL_RELEASE
from ldm.text_files import read_lines
from ldm.util import check_number, refuse_if

SETTINGS = ("steps", "scale", "sampler", "eta")  # options passed to `sample_latents` unchanged


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for sampling images of prompts: the release, the prompts, the sampler and the networks."""
    add = parser.add_argument
    add("--ckpt", type=Path, default=CONVENTIONAL_RELEASE, help="release, a file or a folder of diffusers")
    add_config_options(parser)
    add_vae_option(parser)
    add_caption_options(parser)
    add("--prompt", nargs="+", action="extend", default=[], help="one or more prompts")
    add("--from-file", type=Path, help="text file with one prompt per line")
    add("--n", type=int, default=1, help="samples per prompt")
    add_sampling_options(parser)
    add("--eta", type=float, default=0.0, help="noise added in DDIM steps; 0 is deterministic")
    add("--H", type=int, help="height in pixels; default: the model's own")
    add("--W", type=int, help="width in pixels; default: the model's own")
    add("--batch-size", type=int, default=4, help="samples per batch")
    add_network_options(parser)


def add_vae_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that replaces the autoencoder of a release."""
    parser.add_argument(
        "--vae",
        type=Path,
        metavar="FILE",
        help="file or diffusers folder with an autoencoder that replaces the release's",
    )


def add_out_options(parser: argparse.ArgumentParser, default: str | None = None, required: bool = False) -> None:
    """Add the release to write, as text, since a slash at its end means a folder; and the config for a folder."""
    parser.add_argument(
        "--out",
        required=required,
        metavar="FILE|FOLDER/",
        help="file to write, .ckpt or .safetensors, or with a slash at the end a folder in the layout of diffusers"
        + (f" (default: {default})" if default else ""),
    )
    parser.add_argument(
        "--config", type=Path, help="config of the release, for a folder; default: that of the release's family"
    )


def add_caption_options(parser: argparse.ArgumentParser) -> None:
    """Add the limit of captions, and the layer that encodes them."""
    add = parser.add_argument
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="tokens per caption, read in chunks of 75: 75, 150, 225, ...; default: the release's, or else 75",
    )
    add(
        "--clip-skip",
        type=int,
        metavar="N",
        help="encode captions with the N-th last layer of Stable Diffusion 1's text encoder; default: the release's, "
        "or else 1",
    )


def add_lora_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that adds LoRAs to a release. Its value is a list of pairs of file and strength."""
    parser.add_argument(
        "--lora",
        type=parse_lora,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA, LoCon, DoRA, LoHa or LoKr to add, one or more; strength 1 unless given",
    )


def parse_lora(text: str) -> tuple[Path, float]:
    """Return the file and the strength of an entry `FILE[:STRENGTH]`. A file of the whole name takes precedence."""
    name, colon, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        return Path(text), 1.0
    if not (name and colon) or Path(text).exists():
        return Path(text), 1.0
    if not math.isfinite(strength):
        raise argparse.ArgumentTypeError(f"{text}: the strength must be a finite number")
    return Path(name), strength


def add_config_options(parser: argparse.ArgumentParser, what: str = "config of the release") -> None:
    """Add the options for the config of a release and for the prediction type of its UNet."""
    parser.add_argument(
        "--config", type=Path, help=f"{what}; default: the config of the family recognised from the checkpoint's keys"
    )
    add_parameterization_option(parser)


def add_parameterization_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the prediction type of a release's UNet."""
    parser.add_argument(
        "--parameterization",
        choices=["eps", "v"],
        help="prediction type of the UNet, noise or v; default: from the config, or from the checkpoint's markers and "
        "family",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the seed, the sampler and its settings."""
    add = parser.add_argument
    add("--seed", type=int, default=42, help="seed of the first sample; each further sample adds 1")
    add(
        "--steps",
        type=int,
        default=50,
        help="sampling steps; ddim and plms take more if the number does not divide the model's 1000 timesteps",
    )
    add("--scale", type=float, default=7.5, help="scale of classifier-free guidance; 1 turns it off")
    add("--sampler", choices=tuple(SAMPLERS), default="ddim", help="sampler")


def add_spacing_options(parser: argparse.ArgumentParser) -> None:
    """Add the spacing of steps, and the rescaling of guidance that belongs to it (arXiv:2305.08891)."""
    add = parser.add_argument
    add(
        "--spacing",
        choices=["leading", "linspace", "trailing", "karras"],  # `SPACINGS`, whose module imports torch
        help="positions of the steps; default: trailing for models with zero terminal SNR, else linspace for "
        "dpm_solver and leading for the others",
    )
    add(
        "--guidance-rescale",
        type=float,
        default=0.0,
        help="shift of the contrast towards that without guidance, from 0 to 1; about 0.7 suits zero terminal SNR",
    )


def check_spacing_options(options: argparse.Namespace) -> None:
    """Raise `UserError` for an option of `add_spacing_options` out of its range."""
    check_number("--guidance-rescale", options.guidance_rescale, least=0, most=1, whole=False)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add the device and the precision of the networks."""
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    add("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="precision of the networks")


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """Return `prompts` followed by the lines of `file` that are not empty.

    Raises:
        UserError: there is no prompt, or the file is not UTF-8 text.
    """
    if file is not None:
        prompts = prompts + [line for _, line in read_lines(file)]
    refuse_if(not prompts, "no prompt: give --prompt or --from-file")
    return prompts


def check_image_options(options: argparse.Namespace, seeds: int) -> None:
    """Raise `UserError` for the first option of `add_image_options` out of its range.

    `seeds` is the number of seeds used from `--seed` on.
    """
    check_release("--ckpt", options.ckpt)
    check_number("--n", options.n, least=1)
    check_number("--batch-size", options.batch_size, least=1)
    check_caption_options(options.max_tokens, options.clip_skip)
    check_sampling_options(options, seeds)
    check_number("--eta", options.eta, least=0, most=1, whole=False)


def check_sampling_options(options: argparse.Namespace, seeds: int) -> None:
    """Raise `UserError` for the first option of `add_sampling_options` out of its range.

    `seeds` is the number of seeds used from `--seed` on.
    """
    check_number("--scale", options.scale, whole=False)
    check_number("--seed", options.seed, least=0, most=2**63 - 1 - seeds)
