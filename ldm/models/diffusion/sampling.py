"""Base of all samplers: the loop over steps, inpainting, image to image and the progress bar.

A sampler is a step rule: x, the model's prediction and the step → x at the next, less noisy step.
B: batch. x has the shape (B, C, H, W). ᾱ is `alphas_cumprod`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.guidance import Conditioning, Denoiser, guided_output
from ldm.models.diffusion.spacing import steps_at
from ldm.modules.diffusionmodules.schedule import noised, prediction_to_eps_x0
from ldm.util import UserError, refuse_if


class Prediction(NamedTuple):
    """Predicted noise ε and clean x₀, both (B, C, H, W)."""

    eps: Tensor
    x0: Tensor


# (x, step index) → prediction. A step rule may call it several times.
Predict = Callable[[Tensor, int], Prediction]


class NotFiniteError(UserError):
    """Error for a sample with infinities or NaN. `row` is its index in the batch, if known."""

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class Sampler:
    """Base of samplers, which runs the loop. A subclass defines one `step` rule and the properties of its steps.

    `make_schedule` sets three float64 arrays with one entry per step: `timesteps`, the model's timesteps from most to
    least noisy; `alphas`, ᾱ at each step; and `alphas_prev`, ᾱ after each step.
    """

    title = "the sampler"  # name in messages
    spacing = "leading"  # default spacing of the steps; see `own_spacing`
    is_deterministic = False  # adds no noise, so that eta must be 0
    has_equal_steps = False  # needs steps that are equal in time

    def __init__(self, model: Denoiser, schedule: str = "linear") -> None:
        del schedule  # an argument of old scripts; the model has the schedule
        self.model = model

    @property
    def alphas_cumprod(self) -> np.ndarray:
        return self.model.alphas_cumprod.detach().cpu().double().numpy()

    @property
    def parameterization(self) -> str:
        return getattr(self.model, "parameterization", "eps")

    @property
    def own_spacing(self) -> str:
        """Default spacing: that of the sampler, except at zero terminal SNR.

        At zero terminal SNR it is `trailing`, which starts at the last timestep. For a model that predicts ε it is
        `leading`, because ε carries no information about the image at the last timestep.
        """
        if self.alphas_cumprod[-1] > 0:
            return self.spacing
        return "leading" if self.parameterization == "eps" else "trailing"

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str | None = None,
        ddim_eta: float = 0.0,
        verbose: bool = False,
    ) -> None:
        """Set the steps. `ddim_discretize` is a spacing of `steps_at`; the default is `own_spacing`.

        Raises:
            UserError: as `steps_at`, or the sampler or the model does not support the spacing or eta.
        """
        del verbose
        self.eta = ddim_eta
        spacing = ddim_discretize or self.own_spacing
        refuse_if(
            ddim_eta != 0 and self.is_deterministic,
            f"eta={ddim_eta}: {self.title} is deterministic; leave eta at 0, or use the ddim sampler",
        )
        refuse_if(
            spacing == "karras" and self.has_equal_steps,
            f"spacing karras: {self.title} needs equal steps; use another spacing or sampler",
        )
        self.timesteps, self.alphas, self.alphas_prev = steps_at(spacing, ddim_num_steps, self.alphas_cumprod)
        refuse_if(
            self.alphas[0] == 0 and self.parameterization == "eps",
            f"spacing {spacing}: it starts at zero SNR, where the predicted noise does not determine the image; "
            "use the spacing leading, or set parameterization to v if the model predicts v",
        )
        self.ddim_timesteps = np.rint(self.timesteps[::-1]).astype(int)

    def start(self) -> None:
        """Reset the state of earlier steps. Called before the first step."""

    def step(self, x: Tensor, index: int, predict: Predict, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the next x and the predicted x₀. `noise()` samples standard normal values of x's shape."""
        raise NotImplementedError

    def predict(self, x: Tensor, index: int, guided: Callable[[Tensor, Tensor], Tensor]) -> Prediction:
        """Return the prediction at step `index`. `guided` is the model with guidance, (x, t) → output."""
        t = torch.full((x.shape[0],), self.timesteps[index], device=x.device, dtype=torch.float32)
        t = t if self.timesteps[index] % 1 else t.long()
        output = guided(x, t)
        # Filled on the device, since a copy from the host would synchronise.
        alpha_bar = torch.full((), self.alphas[index], device=x.device, dtype=x.dtype)
        return Prediction(*prediction_to_eps_x0(output.to(x.dtype), x, alpha_bar, self.parameterization))

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Conditioning = None,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        generators: Sequence[torch.Generator] | None = None,
        image_guidance_scale: float | None = None,
        init: Tensor | None = None,
        strength: float = 1.0,
        spacing: str | None = None,
        guidance_rescale: float = 0.0,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Return `batch_size` samples of `shape` (C, H, W) after `S` steps, and `{"x_inter": [...], "pred_x0": [...]}`.

        The spacing `leading` has the stride ⌊T / S⌋, and so more than `S` steps if `S` does not divide T.

        Args:
            callback, img_callback: called after each step, with its index, or with the predicted x₀ and its index.
            eta: noise of DDIM steps: 0 is deterministic, 1 is that of DDPM.
            mask, x0: where `mask` is 1, the sample follows the latents `x0` (B, C, H, W).
            temperature, x_T: scale of the noise added in steps, and initial noise.
            log_every_t: steps between the recorded intermediates.
            unconditional_conditioning: conditioning that guidance moves away from, if the scale is not 1.
            generators: one per sample, so that the noise of a sample does not depend on its batch.
            image_guidance_scale: second scale of guidance; see `guided_output`.
            init, strength: start from the latents `init` (B, C, H, W), and run the share `strength` of the steps, at
                least one (image to image, arXiv:2108.01073).
            spacing, guidance_rescale: one of `SPACINGS` (the default is `own_spacing`), and φ of `rescaled`.

        Raises:
            UserError: the sampler or the model does not support a setting, or a mask has no `x0`.
            NotFiniteError: a step returns infinities or NaN.
        """
        _check_start(mask, x0, strength)
        self._restart(S, spacing, eta)
        noise = self._noise((batch_size, *shape), generators)

        def guided(x: Tensor, t: Tensor) -> Tensor:
            scales = unconditional_guidance_scale, image_guidance_scale, guidance_rescale
            return guided_output(self.model, x, t, conditioning, unconditional_conditioning, *scales)

        def masked(x: Tensor, index: int) -> Tensor:
            return x if mask is None else mask * self._noised(x0, noise(), index) + (1 - mask) * x

        x, first = self._start_of(noise() if x_T is None else x_T, init, strength)
        steps = self._steps(x, first, guided, masked, lambda: temperature * noise(), verbose)
        return self._collect(x, steps, log_every_t, callback, img_callback)

    def _restart(self, steps: int, spacing: str | None, eta: float) -> None:
        """Set the schedule and reset the state of earlier steps."""
        self.make_schedule(steps, spacing, eta)
        self.start()

    def _start_of(self, x: Tensor, init: Tensor | None, strength: float) -> tuple[Tensor, int]:
        """Return the initial x on the device and the index of the first step, from noise `x` and latents `init`."""
        device, count = self.model.alphas_cumprod.device, len(self.timesteps)
        x = x.to(device)
        if init is None:
            return x, 0
        first = count - max(1, round(strength * count))
        return self._noised(init.to(device), x, first), first

    def _collect(
        self,
        x: Tensor,
        steps: Iterable[tuple[int, Tensor, Tensor]],
        log_every_t: int,
        callback: Callable[[int], None] | None,
        img_callback: Callable[[Tensor, int], None] | None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Run `steps` from the initial `x`. Return the last x and the intermediates."""
        intermediates: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        for index, x, pred_x0 in steps:
            if callback:
                callback(index)
            if img_callback:
                img_callback(pred_x0, index)
            if (len(self.timesteps) - 1 - index) % log_every_t == 0:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return x, intermediates

    def _steps(
        self,
        x: Tensor,
        first: int,
        guided: Callable[[Tensor, Tensor], Tensor],
        masked: Callable[[Tensor, int], Tensor],
        noise: Callable[[], Tensor],
        verbose: bool,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the index, x and predicted x₀ of each step from `first` on.

        Raises:
            NotFiniteError: a step returned infinities or NaN. This is checked after the last step, because each check
                synchronises with the device.
        """
        finite: list[Tensor] = []
        for index in tqdm(range(first, len(self.timesteps)), desc=type(self).__name__, disable=not verbose):
            x, pred_x0 = self.step(masked(x, index), index, lambda x, i: self.predict(x, i, guided), noise)
            finite.append(x.isfinite().flatten(1).all(1))
            yield index, x, pred_x0
        flags = torch.stack(finite).cpu()  # step row; the only synchronisation of a sampling run
        if not flags.all():
            step, row = flags.logical_not().nonzero()[0].tolist()
            raise NotFiniteError(
                f"{type(self).__name__}: the sample has NaN or infinities from step {step + 1} of {len(finite)} on; "
                "check the weights, or try --precision fp32",
                row,
            )

    def _noised(self, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        alpha_bar = self.alphas[index]
        return noised(x0, noise, alpha_bar**0.5, (1 - alpha_bar) ** 0.5)

    def _noise(self, shape: tuple[int, ...], generators: Sequence[torch.Generator] | None) -> Callable[[], Tensor]:
        """Return a function that samples standard normal values of `shape` on the model's device."""
        device = self.model.alphas_cumprod.device
        if generators is None:
            return lambda: torch.randn(shape, device=device)

        def of_each_sample() -> Tensor:
            # Sampled on the generator's device, usually the CPU, so that a seed gives the same image on any device.
            values = torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generators])
            return values.to(device, non_blocking=True)

        return of_each_sample


def _check_start(mask: Tensor | None, x0: Tensor | None, strength: float) -> None:
    """Raise `UserError` for a mask without `x0`, or a strength out of range."""
    refuse_if(mask is not None and x0 is None, "mask: give x0 too, the latents that it keeps")
    refuse_if(not 0 < strength <= 1, f"strength {strength}: give a number above 0, up to 1")
