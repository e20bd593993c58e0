"""What every sampler shares: the loop over steps, classifier-free guidance, inpainting and the progress bar.

A sampler is a step rule: x, the model's prediction and the step → x at the next, less noisy step.
B batch; x has shape (B, C, H, W); ᾱ is `alphas_cumprod`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.modules.diffusionmodules.schedule import make_ddim_timesteps, noised, prediction_to_eps_x0
from ldm.util import UserError

# A tensor, a list of tensors, or a dict of such lists: whatever the model's `apply_model` takes.
Conditioning = Any


class Denoiser(Protocol):
    """What a sampler needs of a model. `parameterization` is read if there is one; otherwise it is "eps"."""

    num_timesteps: int
    alphas_cumprod: Tensor

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...


class Prediction(NamedTuple):
    """The noise ε and the clean x₀ that the model sees in x; both (B, C, H, W)."""

    eps: Tensor
    x0: Tensor


# (x, step index) → prediction; a step rule may call it more than once.
Predict = Callable[[Tensor, int], Prediction]


def concatenate(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two conditionings of one form, along the batch."""
    if isinstance(first, dict):
        return {key: concatenate(first[key], second[key]) for key in first}
    if isinstance(first, (list, tuple)):
        return [concatenate(a, b) for a, b in zip(first, second, strict=True)]
    return torch.cat([first, second])


def guided_output(
    model: Denoiser, x: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning, scale: float
) -> Tensor:
    """Classifier-free guidance, uncond + scale · (cond − uncond) (arXiv:2207.12598, eq. 6, with scale = 1 + w)."""
    if uncond is None or scale == 1.0:
        return model.apply_model(x, t, cond)
    both = model.apply_model(torch.cat([x, x]), torch.cat([t, t]), concatenate(uncond, cond))
    without, with_cond = both.float().chunk(2)  # half precision would lose what the difference holds
    return without + scale * (with_cond - without)


class Sampler:
    """The loop. Subclasses set the steps in `make_schedule` and give one `step` rule.

    `make_schedule` leaves `timesteps`, the model times of the steps from most to least noisy, and `alphas` and
    `alphas_prev`, ᾱ at each step and at the one after; all float64 arrays of the number of steps.
    """

    def __init__(self, model: Denoiser, schedule: str = "linear") -> None:
        del schedule  # old scripts name it; the model knows its own
        self.model = model

    @property
    def alphas_cumprod(self) -> np.ndarray:
        return self.model.alphas_cumprod.detach().cpu().double().numpy()

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = False
    ) -> None:
        """The DDIM steps: noise levels at a stride of the training schedule, ending at its first."""
        del verbose
        self.eta = ddim_eta
        self.ddim_timesteps = make_ddim_timesteps(ddim_discretize, ddim_num_steps, self.model.num_timesteps)
        alphas = self.alphas_cumprod[self.ddim_timesteps]
        self.timesteps = self.ddim_timesteps[::-1].astype(np.float64)
        self.alphas = alphas[::-1]
        self.alphas_prev = np.append(self.alphas[1:], self.alphas_cumprod[0])

    def start(self) -> None:
        """Forget earlier steps; called before the first one."""

    def step(self, x: Tensor, index: int, predict: Predict, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The next x and the x₀ it heads for. `noise()` draws fresh standard normal values shaped like x."""
        raise NotImplementedError

    def predict(self, x: Tensor, index: int, cond: Conditioning, uncond: Conditioning, scale: float) -> Prediction:
        """The guided prediction at step `index`."""
        t = torch.full((x.shape[0],), self.timesteps[index], device=x.device, dtype=torch.float32)
        t = t if self.timesteps[index] % 1 else t.long()
        output = guided_output(self.model, x, t, cond, uncond, scale)
        # filled on the device: a tensor made of a Python number would cross over, and be waited for
        alpha_bar = torch.full((), self.alphas[index], device=x.device, dtype=x.dtype)
        parameterization = getattr(self.model, "parameterization", "eps")
        return Prediction(*prediction_to_eps_x0(output.to(x.dtype), x, alpha_bar, parameterization))

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
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Draw `batch_size` samples of `shape` (C, H, W) in `S` steps.

        At the stride of DDIM and PLMS, ⌊T / S⌋, there are more where `S` does not divide T: 500 for 400 of T = 1000,
        and all 1000 for 600.

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
            generators: one a sample; then a sample's noise does not depend on the batch it is drawn in.

        Returns:
            The samples (B, C, H, W), and `{"x_inter": [...], "pred_x0": [...]}`.

        Raises:
            UserError: a number of steps or an eta that the sampler cannot take; a mask without `x0`.
        """
        if mask is not None and x0 is None:
            raise UserError("a mask needs the latents x0 that it keeps")
        self.make_schedule(S, ddim_eta=eta)
        self.start()
        device = self.model.alphas_cumprod.device
        full_shape = (batch_size, *shape)

        def noise() -> Tensor:
            if generators is None:
                return torch.randn(full_shape, device=device)
            # Drawn where the generator lives (usually the CPU), so that a seed means one picture on every device.
            drawn = [torch.randn(tuple(shape), generator=g, device=g.device) for g in generators]
            return torch.stack(drawn).to(device)

        def predict(x: Tensor, index: int) -> Prediction:
            return self.predict(x, index, conditioning, unconditional_conditioning, unconditional_guidance_scale)

        x = noise() if x_T is None else x_T.to(device)
        intermediates: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        steps = len(self.timesteps)
        for index in tqdm(range(steps), desc=type(self).__name__, disable=not verbose):
            if mask is not None:
                alpha_bar = self.alphas[index]
                kept = noised(x0, noise(), alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
                x = mask * kept + (1 - mask) * x
            x, pred_x0 = self.step(x, index, predict, lambda: temperature * noise())
            if callback:
                callback(index)
            if img_callback:
                img_callback(pred_x0, index)
            if (steps - 1 - index) % log_every_t == 0:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return x, intermediates
