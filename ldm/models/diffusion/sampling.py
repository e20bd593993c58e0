"""The loop over steps that all samplers share, with inpainting, image to image and the progress bar.

A sampler is a step rule: x, the model's prediction and the step → x at the next, less noisy step.
B batch; x has shape (B, C, H, W); ᾱ is `alphas_cumprod`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.guidance import Conditioning, Denoiser, guided_output
from ldm.models.diffusion.spacing import steps_at
from ldm.modules.diffusionmodules.schedule import noised, prediction_to_eps_x0
from ldm.util import UserError


class Prediction(NamedTuple):
    """The noise ε and the clean x₀ that the model sees in x; both (B, C, H, W)."""

    eps: Tensor
    x0: Tensor


# (x, step index) → prediction; a step rule may call it more than once.
Predict = Callable[[Tensor, int], Prediction]


class NotFiniteError(UserError):
    """A sample that holds infinities or NaN; `row` is its place in the batch, where that is known."""

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class Sampler:
    """The loop. Subclasses give one `step` rule, and the `spacing` of steps that it was published with.

    `make_schedule` leaves `timesteps`, the model times of the steps from most to least noisy, and `alphas` and
    `alphas_prev`, ᾱ at each step and at the one after; all float64 arrays of the number of steps.
    """

    spacing = "leading"

    def __init__(self, model: Denoiser, schedule: str = "linear") -> None:
        del schedule  # old scripts name it; the model knows its own
        self.model = model

    @property
    def alphas_cumprod(self) -> np.ndarray:
        return self.model.alphas_cumprod.detach().cpu().double().numpy()

    @property
    def parameterization(self) -> str:
        return getattr(self.model, "parameterization", "eps")

    @property
    def own_spacing(self) -> str:
        """The spacing where none is asked for: a schedule that ends without signal is sampled from its very end.

        A model that predicts the noise says nothing there, so that its steps lead away from the end.
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
        """Set the steps: those of `steps_at` for the spacing `ddim_discretize`, or else for `own_spacing`.

        Raises:
            UserError: see `steps_at`; or the first step has no signal, of which a prediction of the noise says nothing.
        """
        del verbose
        self.eta = ddim_eta
        spacing = ddim_discretize or self.own_spacing
        self.timesteps, self.alphas, self.alphas_prev = steps_at(spacing, ddim_num_steps, self.alphas_cumprod)
        if self.alphas[0] == 0 and self.parameterization == "eps":
            raise UserError(
                f"spacing {spacing}: the schedule ends without signal, where a model that predicts the noise says "
                "nothing; set parameterization to v if it predicts v, or take the spacing leading"
            )
        self.ddim_timesteps = np.rint(self.timesteps[::-1]).astype(int)  # rising, as old scripts read them

    def start(self) -> None:
        """Forget earlier steps; called before the first one."""

    def step(self, x: Tensor, index: int, predict: Predict, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the next x and the predicted x₀. `noise()` gives fresh standard normal values shaped like x."""
        raise NotImplementedError

    def predict(self, x: Tensor, index: int, guided: Callable[[Tensor, Tensor], Tensor]) -> Prediction:
        """Return the prediction at step `index`; `guided` is the model under its conditionings, (x, t) → output."""
        t = torch.full((x.shape[0],), self.timesteps[index], device=x.device, dtype=torch.float32)
        t = t if self.timesteps[index] % 1 else t.long()
        output = guided(x, t)
        # filled on the device: a tensor made of a Python number would cross over, and be waited for
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
        """Return `batch_size` samples of `shape` (C, H, W), made in `S` steps.

        With the spacing `leading`, a stride of ⌊T / S⌋, there are more where `S` does not divide T: 500 for 400 of
        T = 1000, and all 1000 for 600.

        Args:
            callback: called with the index of each step done.
            img_callback: called with the predicted x₀ and the index of each step done.
            eta: 0 deterministic, 1 as noisy as DDPM; only where the step rule takes it.
            mask, x0: where `mask` is 1, the sample follows the given latents `x0` (B, C, H, W).
            temperature: scale of the noise added in steps.
            verbose: show a progress bar.
            x_T: the noise to start from.
            log_every_t: steps between entries of the intermediates.
            unconditional_conditioning: what guidance moves away from; with `unconditional_guidance_scale` 1, unused.
            generators: one per sample; the noise of a sample then does not depend on its batch.
            image_guidance_scale: the second scale of guidance; see `guided_output`.
            init, strength: start from the latents `init` (B, C, H, W), noised for the last `strength` of the steps
                (image to image, arXiv:2108.01073); at least one step runs.
            spacing: one of `ldm.models.diffusion.spacing.SPACINGS`; by default `own_spacing`.
            guidance_rescale: φ; see `guided_output`.

        Returns:
            The samples (B, C, H, W), and `{"x_inter": [...], "pred_x0": [...]}`.

        Raises:
            UserError: a number or a spacing of steps, an eta or a strength that the sampler cannot take; a mask without
                `x0`.
            NotFiniteError: a step gives infinities or NaN.
        """
        if mask is not None and x0 is None:
            raise UserError("a mask needs the latents x0 that it keeps")
        if not 0 < strength <= 1:
            raise UserError(f"strength {strength}: give a number above 0, up to 1")
        self.make_schedule(S, spacing, eta)
        self.start()
        device = self.model.alphas_cumprod.device
        noise = self._noise((batch_size, *shape), generators, device)

        def guided(x: Tensor, t: Tensor) -> Tensor:
            scales = unconditional_guidance_scale, image_guidance_scale, guidance_rescale
            return guided_output(self.model, x, t, conditioning, unconditional_conditioning, *scales)

        def keep(x: Tensor, index: int) -> Tensor:
            return x if mask is None else mask * self._noised(x0, noise(), index) + (1 - mask) * x

        first = 0
        x = noise() if x_T is None else x_T.to(device)
        if init is not None:
            first = len(self.timesteps) - max(1, round(strength * len(self.timesteps)))
            x = self._noised(init.to(device), x, first)
        intermediates: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        steps = self._steps(x, first, guided, keep, lambda: temperature * noise(), verbose)
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
        keep: Callable[[Tensor, int], Tensor],
        noise: Callable[[], Tensor],
        verbose: bool,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the index, x and predicted x₀ of each step from `first` on.

        Raises:
            NotFiniteError: once all steps are done, so that nothing waits for the device before.
        """
        finite: list[Tensor] = []
        for index in tqdm(range(first, len(self.timesteps)), desc=type(self).__name__, disable=not verbose):
            x, pred_x0 = self.step(keep(x, index), index, lambda x, i: self.predict(x, i, guided), noise)
            finite.append(x.isfinite().flatten(1).all(1))
            yield index, x, pred_x0
        flags = _on_host(torch.stack(finite))  # step row
        if not flags.all():
            step, row = flags.logical_not().nonzero()[0].tolist()
            raise NotFiniteError(
                f"{type(self).__name__}: the sample holds NaN or infinities from step {step + 1} of {len(finite)} on; "
                "check the weights, or try --precision fp32",
                row,
            )

    def _noised(self, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        alpha_bar = self.alphas[index]
        return noised(x0, noise, alpha_bar**0.5, (1 - alpha_bar) ** 0.5)

    @staticmethod
    def _noise(
        shape: tuple[int, ...], generators: Sequence[torch.Generator] | None, device: torch.device
    ) -> Callable[[], Tensor]:
        if generators is None:
            return lambda: torch.randn(shape, device=device)
        # Sampled where the generator lives (usually the CPU), so that a seed means one image on every device.
        return lambda: torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generators]).to(
            device
        )


def _on_host(flags: Tensor) -> Tensor:
    """Return `flags` on the CPU, once its device is done: the one wait of a sampling, after the last step."""
    copied = flags.to("cpu", non_blocking=True)
    if flags.device.type in ("cuda", "mps"):
        getattr(torch, flags.device.type).synchronize()
    return copied
