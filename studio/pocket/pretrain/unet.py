"""Train the UNet of `pocket-sd`: latents of scenes from their captions.

A `UNet2DConditionModel` with cross attention on the frozen text tower of `pocket-clip`, on latents of the frozen
autoencoder. It predicts the velocity (Salimans & Ho, Progressive Distillation for Fast Sampling of Diffusion Models,
2022, arXiv 2202.00512):

    z_t = sqrt(a_t) z + sqrt(1 - a_t) n,    loss = | unet(z_t, t, caption) - (sqrt(a_t) n - sqrt(1 - a_t) z) |^2

with the cosine schedule: it ends in pure noise, so the colour of a whole background can be learnt, and it spends less
of its steps there than Stable Diffusion's own, whose latents have 64 times as many pixels. One caption in ten is empty,
for classifier-free guidance. A share `plain` of each batch shows one sprite in the middle, which is what a bare name
stands for: to learn 900 pictures well is much quicker than to learn 900 at every size and place. A share `pairs` shows
two sprites side by side, each as plainly, in a picture twice as wide: what a name and a name stand for. The rest is
varied.
Latents are computed once; captions are drawn anew at every step. A last, short training with `variant_share` loosens
what has been learnt by heart: see `variants`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from graft.studio.config import require
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.pretrain import network_adapter
from graft.studio.pocket.pretrain.draw import kept, on_device, pictures, rng_of
from graft.studio.pocket.pretrain.variants import MARK, PseudoWords, Variants, cached_variants
from graft.studio.pocket.scenes import COLOURS, Scene, caption, centred, portrait, sample_scene, side_by_side

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.studio.job import TrainConfig

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": (128, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 192,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,  # without effect here, but diffusers warns without it
}


class Batch(NamedTuple):
    """Clean latents (b, 16, 8, w), token ids (b, n), noise like the latents, timesteps (b,), features of variants."""

    latents: Tensor
    input_ids: Tensor
    noise: Tensor
    timesteps: Tensor
    features: Tensor | None = None


def plain_scenes(colours: Sequence[str] = tuple(COLOURS)) -> list[Scene]:
    """Return the plainest picture of every known sprite on every colour."""
    return [centred(sprite, colour) for sprite in Atlas.load().known for colour in colours]


def varied_scenes(count: int, seed: int = 11) -> list[Scene]:
    """Return `count` scenes of any size, place, ground and company; every known sprite comes equally often."""
    rng = np.random.default_rng(seed)
    known = Atlas.load().known
    scenes: list[Scene] = []
    while len(scenes) < count:
        for sprite in rng.permutation(known):
            kind = rng.random()
            if kind < 0.4:
                scenes.append(portrait(rng, int(sprite)))
            elif kind < 0.7:
                scenes.append(sample_scene(rng, [sprite], objects=(1.0,)))
            else:
                others = 1 if rng.random() < 0.7 else 2
                company = rng.choice([k for k in known if k != sprite], others, replace=False)
                objects = (0.0, 1.0) if others == 1 else (0.0, 0.0, 1.0)
                scenes.append(sample_scene(rng, [sprite, *company], objects))
    return scenes[:count]


def pair_scenes(count: int, seed: int = 13) -> list[Scene]:
    """Return `count` scenes of two known sprites side by side; every sprite comes equally often on either side."""
    rng = np.random.default_rng(seed)
    known = Atlas.load().known
    scenes: list[Scene] = []
    while len(scenes) < count:
        for first, second in zip(rng.permutation(known), rng.permutation(known), strict=True):
            scenes.append(side_by_side(int(first), int(second), list(COLOURS)[rng.integers(len(COLOURS))]))
    return scenes[:count]


@torch.no_grad()
def cached_latents(vae: Any, scenes: list[Scene], folder: Path, batch_size: int = 64) -> Tensor:
    """Return the posterior means of scenes of one width, (count, 16, 8, width / 8) float16 on the CPU."""

    def make() -> dict[str, Tensor]:
        parts = []
        for start in range(0, len(scenes), batch_size):
            batch = on_device(pictures(scenes[start : start + batch_size]), vae)
            parts.append(vae.encode(batch).latent_dist.mean.half().cpu())
        return {"latents": torch.cat(parts)}

    return kept(folder, "latents", (vae, scenes), make)["latents"]


@dataclass(frozen=True)
class Unet:
    """How much data of which kind, and the average of the weights."""

    scenes: int = 9_000
    """Varied scenes, beside the plain ones; the latents of about 250 scenes are computed in a second."""
    plain: float = 0.75
    """Share of plain scenes in a batch."""
    pairs: float = 0.0
    """Share of scenes of two sprites side by side, among variants, too; they are twice as large."""
    variants: int = 9_000
    """Pictures of sprites that never were, for `variant_share`; 100 are made in a second."""
    variant_share: float = 0.0
    """Share of a batch that shows them, told by pseudo-words; half of it, in a training that goes on from names."""
    go_on: bool = False
    """Start from the committed weights instead of from nothing."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are the ones to use."""
    compile: bool = False
    """Compile the network: a minute more at the start, each step a quarter shorter on a CPU."""

    def task(self, train: TrainConfig) -> UnetTask:
        """Return the training, on the committed autoencoder and text tower."""
        from graft.studio.pocket import models

        shares = self.plain, self.pairs
        require(
            "method.plain, method.pairs", shares, min(shares) >= 0 and sum(shares) <= 1, "shares, together at most 1"
        )
        device = train.device or "cpu"
        parts = models.autoencoder().to(device), models.text_encoder().to(device), models.load_tokenizer()
        task = UnetTask(
            *parts, models.cache_root(), self.scenes, self.plain, train.batch_size, self.ema_decay, pairs=self.pairs
        )
        if self.variant_share:
            tower = models.clip().vision_model.to(device)
            drawn = [cached_variants(parts[0], tower, self.variants, models.cache_root())]
            if self.pairs:
                drawn.append(cached_variants(parts[0], tower, self.variants, models.cache_root(), paired=True))
            task.add_variants(drawn, parts[0].config.scaling_factor, self.variant_share)
        if self.go_on:
            task.start_from(models.unet())
        if self.compile:
            task.unet.compile(dynamic=False)  # once for each width
        return task


class UnetTask(nn.Module):
    """One training of the UNet.

    Args:
        vae: the frozen autoencoder.
        text_encoder: the frozen text tower, a `CLIPTextModel`.
        tokenizer: its tokenizer.
        folder: where latents are kept.
        scenes: varied scenes whose latents are computed.
        plain: share of plain scenes in a batch.
        batch_size: latents in a step.
        ema_decay: of the averaged weights, which are the ones to use.
        plain_colours: backgrounds of the plain scenes.
        pairs: share of scenes of two sprites side by side in a batch.
    """

    default_learning_rate = 1e-3

    def __init__(
        self, vae: Any, text_encoder: Any, tokenizer: Any, folder: Path,
        scenes: int = 9_000, plain: float = 0.75, batch_size: int = 64, ema_decay: float = 0.999,
        plain_colours: Sequence[str] = tuple(COLOURS), pairs: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        from diffusers import DDIMScheduler, UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor

        self.batch_size, self.ema_decay = batch_size, ema_decay
        self.plain, self.pairs = plain, pairs
        self.tokenizer = tokenizer
        self.frozen = (text_encoder.eval().requires_grad_(False),)  # a tuple hides it from parameters()
        self.scenes = plain_scenes(plain_colours)
        self.first_varied = len(self.scenes)
        self.scenes += varied_scenes(scenes)
        self.pair_scenes = pair_scenes(2 * scenes if pairs else 0)
        self.latents, self.pair_latents = (
            cached_latents(vae.eval(), some, folder) * vae.config.scaling_factor if some else torch.empty(0)
            for some in (self.scenes, self.pair_scenes)
        )
        self.alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod
        self.unet = UNet2DConditionModel(**CONFIG).to(memory_format=torch.channels_last)
        if text_encoder.device.type == "cpu":
            # There the fused attention is the slower one for 64 positions: a step of 32 takes 0.29 s instead of 0.48.
            self.unet.set_attn_processor(AttnProcessor())
        self.ema = nn.ParameterList(p.detach().clone() for p in self.unet.parameters()).requires_grad_(False)
        self.variants: list[Variants] = []
        self.words: PseudoWords | None = None
        self.variant_rows = 0

    def add_variants(self, variants: Sequence[Variants], scaling_factor: float, share: float) -> None:
        """Show variants, alone and in company, in a share of each batch, and train the words that tell them."""
        self.variants = [some._replace(latents=some.latents * scaling_factor) for some in variants]
        self.variant_rows = round(share * self.batch_size)
        self.words = PseudoWords(self.frozen[0], self.tokenizer(MARK).input_ids[1], variants[0].features)

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the UNet, and the pseudo-words at four times its learning rate: they start from nothing."""
        groups: list[dict[str, Any]] = [{"params": list(self.unet.parameters())}]
        return groups + ([{"params": list(self.words.map.parameters()), "lr_scale": 4.0}] if self.words else [])

    def batch(self, step: int, generator: torch.Generator) -> list[Batch]:
        """Return the latents, captions, noise and timesteps of one step: of pictures of one sprite, then of pairs."""
        rng = rng_of(generator)
        named = self.batch_size - self.variant_rows
        plain, pairs = round(self.plain * named), round(self.pairs * named)
        paired = round(self.pairs * self.variant_rows) if len(self.variants) > 1 else 0
        alone = np.concatenate(
            [
                rng.integers(self.first_varied, size=plain),
                rng.integers(self.first_varied, len(self.scenes), size=named - plain - pairs),
            ]
        )
        parts = [self._part(self.scenes, self.latents, alone, self.variant_rows - paired, 0, rng, generator)]
        if pairs + paired:
            chosen = rng.integers(len(self.pair_scenes), size=pairs)
            parts.append(self._part(self.pair_scenes, self.pair_latents, chosen, paired, 1, rng, generator))
        return parts

    def _part(
        self, scenes: Sequence[Scene], latents: Tensor, chosen: np.ndarray, variants: int, kind: int,
        rng: np.random.Generator, generator: torch.Generator,
    ) -> Batch:  # fmt: skip
        """Return the rows of one width: scenes, and variants of a kind behind them."""
        texts = ["" if rng.random() < 0.1 else caption(scenes[k], rng) for k in chosen]
        clean, features = latents[torch.from_numpy(chosen)].float(), None
        if variants:
            some = self.variants[kind]
            rows = torch.from_numpy(rng.integers(len(some.latents), size=variants))
            texts += [some.caption(int(row), rng) for row in rows]
            clean = torch.cat([clean, some.latents[rows].float()])
            features = some.features[rows]
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.randn(clean.shape, generator=generator)
        # one timestep from each of `b` strata: the loss of a batch varies less; more from the noisy end, where the
        # picture comes from the name alone
        strata = torch.randperm(len(clean), generator=generator)
        spread = (strata + torch.rand(len(clean), generator=generator)) / len(clean)
        last = len(self.alphas) - 1  # rounding can make the largest value 1
        return Batch(clean, ids, noise, (spread ** (2 / 3) * len(self.alphas)).long().clamp(max=last), features)

    @torch.no_grad()
    def start_from(self, unet: nn.Module) -> None:
        """Take the weights, and the average, from a network."""
        for weight, average, value in zip(self.unet.parameters(), self.ema, unet.parameters(), strict=True):
            weight.copy_(value)
            average.copy_(value)

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the averaged weights towards the current ones."""
        torch._foreach_lerp_(list(self.ema), list(self.unet.parameters()), 1 - self.ema_decay)

    def forward(self, parts: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of the velocity, over all elements of all parts."""
        self.update_average()  # of the weights that the last step left
        errors = [self._error(on_device(part, self)) for part in parts]
        return torch.stack([e.sum() for e in errors]).sum() / sum(e.numel() for e in errors), {}

    def _error(self, batch: Batch) -> Tensor:
        """Return the squared errors of the velocity, like the latents."""
        alpha = self.alphas.to(batch.timesteps.device)[batch.timesteps].view(-1, 1, 1, 1)
        if batch.features is None or self.words is None:
            with torch.no_grad():
                context = self.frozen[0](batch.input_ids).last_hidden_state
        else:
            context = self.words.context(batch.input_ids, batch.features)
        noisy = alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * batch.noise
        velocity = alpha.sqrt() * batch.noise - (1 - alpha).sqrt() * batch.latents
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        return (self.unet(noisy, batch.timesteps, context).sample.float() - velocity).square()

    def sample(self, step: int, folder: Path) -> list[Path]:
        """Draw nothing: `graft pocket report` shows what the finished model draws."""
        return []

    @torch.no_grad()
    def adapter(self, metrics: dict[str, Any]) -> Adapter:
        """Return the network with its averaged weights."""
        for weight, average in zip(self.unet.parameters(), self.ema, strict=True):
            weight.copy_(average)
        return network_adapter(self.unet, "unet", metrics)
