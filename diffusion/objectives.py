r"""What the denoiser is asked to predict, at which noise levels, and how much each level counts.

Epsilon (Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239) and v (Salimans, Ho,
"Progressive Distillation for Fast Sampling of Diffusion Models", 2022, arXiv:2202.00512) share

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n,    target = n | sqrt(abar_t) n - sqrt(1 - abar_t) x_0 | x_0

with `abar` = `alphas_cumprod`. Flow (Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis", 2024, arXiv:2403.03206) is x_s = (1 - s) x_0 + s n with target n - x_0.

Min-SNR weighting (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023, arXiv:2303.09556),
snr = abar / (1 - abar), g = `snr_gamma`: min(snr, g) on the x_0 error, which is min(snr, g) / snr for epsilon and
min(snr, g) / (snr + 1) for v. (Some public scripts use min(snr, g) / snr + 1 for v, which weights every level by at
least one; we follow the paper.)

An objective is chosen once, from the base's scheduler, by `objective_for`; nothing downstream asks which one it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from graft.studio.errors import InputError


class Objective(Protocol):
    """Noise levels, noisy latents, targets and weights.

    Levels are (b,) and stay on the CPU, so that looking them up never waits for the device; latents are (b, c, h, w).
    """

    def levels(self, b: int, generator: torch.Generator) -> Tensor:
        """Draws `b` noise levels on the CPU."""
        ...

    def timesteps(self, levels: Tensor) -> Tensor:
        """What the denoiser is told: (b,)."""
        ...

    def noisy(self, x0: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Latents at these levels: (b, c, h, w)."""
        ...

    def target(self, x0: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What the denoiser should answer: (b, c, h, w)."""
        ...

    def weights(self, levels: Tensor) -> Tensor:
        """How much each level's squared error counts: (b,)."""
        ...


def spread(b: int, generator: torch.Generator) -> Tensor:
    """`b` numbers, each uniform on (0, 1), one in every b-th of it: (b,).

    A batch then sees all noise levels, and the loss, whose size depends most of all on the level, is less noisy.
    """
    return (torch.arange(b) + torch.rand(b, generator=generator)).clamp(1e-6, b - 1e-6 * b) / b


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Prediction:
    """A kind of target: its formula, and min-SNR's weight for it from (snr, gamma)."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    min_snr: Callable[[Tensor, float], Tensor]


# a = sqrt(abar), s = sqrt(1 - abar). Epsilon's min(snr, g) / snr is written so that snr = 0 gives its limit, 1.
PREDICTIONS = {
    "epsilon": Prediction(lambda x0, n, a, s: n, lambda snr, g: (g / snr).clamp(max=1)),
    "v_prediction": Prediction(lambda x0, n, a, s: a * n - s * x0, lambda snr, g: snr.clamp(max=g) / (snr + 1)),
    "sample": Prediction(lambda x0, n, a, s: x0, lambda snr, g: snr.clamp(max=g)),
}


class Denoising:
    """Epsilon, v or x_0 prediction on a table of `alphas_cumprod` (T,); levels are integers on 0..T-1.

    They are uniform or, with `cubic`, (1 - u^3) T of a uniform u: most of them at much noise.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: str, snr_gamma: float | None = None, cubic: bool = False):
        self.cubic = cubic
        self.abar = alphas_cumprod.detach().double().cpu()
        self.prediction = PREDICTIONS[prediction]
        snr = self.abar / (1 - self.abar)
        weights = torch.ones_like(snr) if snr_gamma is None else self.prediction.min_snr(snr, snr_gamma)
        self.table = weights.float()

    def levels(self, b: int, generator: torch.Generator) -> Tensor:
        """Draws `b` integers on 0..T-1."""
        shares = spread(b, generator)
        return ((1 - shares**3 if self.cubic else shares) * len(self.abar)).long().clamp(max=len(self.abar) - 1)

    def timesteps(self, levels: Tensor) -> Tensor:
        """The levels themselves."""
        return levels

    def noisy(self, x0: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """sqrt(abar) x_0 + sqrt(1 - abar) n."""
        a, s = self._scales(x0, levels)
        return a * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """The chosen prediction's target."""
        return self.prediction.target(x0, noise, *self._scales(x0, levels))

    def weights(self, levels: Tensor) -> Tensor:
        """One, or min-SNR's weight."""
        return self.table[levels]

    def _scales(self, x0: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.abar[levels]
        return _wide(abar.sqrt(), x0), _wide((1 - abar).sqrt(), x0)


@dataclass(frozen=True)
class Flow:
    """Rectified flow; levels are sigmas in (0, 1)."""

    scale: float = 1000.0
    """Timestep of sigma 1: the scheduler's `num_train_timesteps`."""
    shift: float = 1.0
    """s -> shift s / (1 + (shift - 1) s): above 1 moves the levels towards noise, as large pictures need."""
    mean: float = 0.0
    """Mean of the normal under the logistic; above 0 means more noise."""
    std: float | None = 1.0
    """Its standard deviation; None draws sigmas uniformly instead."""

    def levels(self, b: int, generator: torch.Generator) -> Tensor:
        """Draws `b` sigmas, logit-normal or uniform, then shifted."""
        sigmas = spread(b, generator)
        if self.std is not None:
            sigmas = torch.sigmoid(self.mean + self.std * torch.special.ndtri(sigmas.double()).float())
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def timesteps(self, levels: Tensor) -> Tensor:
        """Sigma times the number of training timesteps."""
        return levels * self.scale

    def noisy(self, x0: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """(1 - s) x_0 + s n."""
        s = _wide(levels, x0)
        return (1 - s) * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """n - x_0."""
        return noise - x0

    def weights(self, levels: Tensor) -> Tensor:
        """One everywhere: the density of the levels does the weighting."""
        return torch.ones_like(levels)


def objective_for(scheduler: Any, snr_gamma: float | None = None, tokens: int = 0, cubic: bool = False) -> Objective:
    """The objective that a base's scheduler was trained with.

    Args:
        scheduler: a diffusers scheduler. One without `alphas_cumprod` but with `sigmas` is a flow scheduler.
        snr_gamma: min-SNR's gamma (the paper's is 5); None weights every level equally.
        tokens: of a picture, for schedulers whose shift grows with it.
        cubic: draw most noise levels at much noise.

    Raises:
        InputError: an unknown prediction type, a scheduler of neither kind, or min-SNR or cubic levels on a flow model.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if snr_gamma is not None and snr_gamma <= 0:
        raise InputError(f"snr_gamma = {snr_gamma}", "it must be above 0", "The paper's value is 5")
    if hasattr(scheduler, "alphas_cumprod"):
        kind = config.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            known = ", ".join(PREDICTIONS)
            raise InputError(f"prediction_type {kind!r}", f"{name} must predict one of {known}", "Use another base")
        return Denoising(scheduler.alphas_cumprod, kind, snr_gamma, cubic)
    if not hasattr(scheduler, "sigmas"):
        raise InputError(name, "neither alphas_cumprod nor sigmas tell how to add noise", "Use a diffusers scheduler")
    if snr_gamma is not None:
        raise InputError(f"snr_gamma = {snr_gamma}", f"min-SNR does not fit {name}, a flow scheduler", "Leave it out")
    if cubic:
        raise InputError('levels = "cubic"', f"they do not fit {name}, a flow scheduler", 'Use levels = "uniform"')
    return Flow(scale=float(config.get("num_train_timesteps", 1000)), shift=_shift(config, tokens))


def _shift(config: Any, tokens: int) -> float:
    """The scheduler's own shift or, where it follows the size of the picture, that of so many tokens."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0) or 1.0)
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def weighted_mse(prediction: Tensor, target: Tensor, weights: Tensor, places: Tensor | None = None) -> Tensor:
    """Squared error per row, weighted, in fp32: (b, c, h, w) twice and (b,) -> (b,).

    Args:
        prediction: of the denoiser.
        target: what it should be.
        weights: of the rows.
        places: what each place counts, (b, 1, h, w); the mean is over what counts. None: all the same.
    """
    errors = (prediction.float() - target.float()).square()
    if places is None:
        return errors.flatten(1).mean(1) * weights
    share = places.flatten(1).mean(1).clamp(min=1e-6)  # a random crop may miss all that is marked
    return (errors * places).flatten(1).mean(1) / share * weights
