"""Train `pocket-clip`: pictures and captions of the embedded world in one space.

A transformers `CLIPModel` (Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021,
arXiv 2103.00020). Steps of two kinds take turns:

    captions: symmetric cross entropy of  s u_i . v_j  over the (picture, caption) pairs of the batch
    names:    cross entropy of  s u_i . v_c  over `bank` known names c, in one phrasing drawn for the step

with u, v the normalised projections and s = exp(logit_scale). The second kind shows each picture more wrong names than
those that happen to be in its batch. No sprite occurs twice in a batch, so no pair is wrongly called negative. Half of
the pictures are worn (blurred, noisy), since drawings of a diffusion model are to be read, too. With `freeze_text` the
texts cost next to nothing, and the bank can hold all known names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.pretrain import network_adapter
from graft.studio.pocket.pretrain.draw import on_device, pictures, rng_of, worn
from graft.studio.pocket.scenes import COLOURS, Scene, caption, centred, opening, portrait, sample_scene, with_article
from graft.studio.pocket.tokenizer import LENGTH, load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import CLIPConfig, CLIPTokenizer

    from graft.studio.adapter import Adapter
    from graft.studio.job import TrainConfig

TEXT: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": LENGTH,
    "hidden_act": "gelu",
    "projection_dim": 192,
}
VISION: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "image_size": 64,
    "patch_size": 8,
    "hidden_act": "gelu",
    "projection_dim": 192,
}


def config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Return the configuration of `pocket-clip`."""
    from transformers import CLIPConfig

    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    text = TEXT | marks | {"vocab_size": len(tokenizer)}
    return CLIPConfig(text_config=text, vision_config=VISION, projection_dim=VISION["projection_dim"])


class Batch(NamedTuple):
    """Pictures (b, 3, 64, 64), token ids (c, n) and, for a names step, the right name of each picture (b,)."""

    pictures: Tensor
    input_ids: Tensor
    target: Tensor | None


@dataclass(frozen=True)
class Clip:
    """Which towers are trained, and from what."""

    go_on: bool = False
    """Start from the committed weights instead of from nothing."""
    bank: int = 384
    """Names that a picture of a names step is compared with."""
    freeze_text: bool = False
    """Go on from the committed weights with the image tower only: the text space of `pocket-sd` stays as it is."""

    def task(self, train: TrainConfig) -> ClipTask:
        """Return the training."""
        task = ClipTask(train.batch_size, self.bank, self.freeze_text)
        if self.go_on or self.freeze_text:
            from graft.studio.pocket import models

            task.clip.load_state_dict(models.clip().state_dict())
        return task


class ClipTask(nn.Module):
    """One training of the two towers.

    Args:
        batch_size: pictures in a step.
        bank: names that a picture of a names step is compared with.
        freeze_text: train the image tower only, towards the text space as it is.
    """

    default_learning_rate = 1e-3

    def __init__(self, batch_size: int = 128, bank: int = 384, freeze_text: bool = False):
        super().__init__()
        from transformers import CLIPModel

        self.batch_size, self.bank = batch_size, bank
        self.atlas = Atlas.load()
        self.tokenizer = load_tokenizer()
        self.clip = CLIPModel(config(self.tokenizer))
        # On a CPU the fused attention takes twice as long for 65 tokens, nearly all of it in the backward pass.
        self.clip.set_attn_implementation("eager")
        if freeze_text:
            self.clip.text_model.requires_grad_(False)
            self.clip.text_projection.requires_grad_(False)

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Return the pictures and texts of one step: captions on even steps, names on odd ones."""
        rng = rng_of(generator)
        order = rng.permutation(self.atlas.known)
        if step % 2:
            targets = order[: self.batch_size]
            scenes = [self._scene(rng, int(sprite)) for sprite in targets]
            names = [self.atlas.names[i] for i in order[: self.bank]]
            phrase = opening(rng)
            texts = [phrase.format(with_article(name), bare=name) for name in names]
            return Batch(worn(pictures(scenes), generator), self._tokens(texts), torch.arange(self.batch_size))
        scenes = [sample_scene(rng, order[3 * k : 3 * k + 3].tolist()) for k in range(self.batch_size)]
        return Batch(worn(pictures(scenes), generator), self._tokens([caption(scene, rng) for scene in scenes]), None)

    def _scene(self, rng: np.random.Generator, sprite: int) -> Scene:
        """Draw a scene of one sprite; half of them are large and plain."""
        kind = rng.random()
        if kind < 0.25:
            return centred(sprite, str(rng.choice(list(COLOURS))))
        return portrait(rng, sprite) if kind < 0.5 else sample_scene(rng, [sprite], objects=(1.0,))

    def _tokens(self, texts: list[str]) -> Tensor:
        """Return ids padded to the longest text only: behind the end mark a causal tower's output is not read."""
        return self.tokenizer(texts, padding="longest", truncation=True, return_tensors="pt").input_ids

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and the share of pictures whose own text is nearest."""
        batch, clip = on_device(batch, self), self.clip
        seen = clip.visual_projection(clip.vision_model(batch.pictures).pooler_output)
        told = clip.text_projection(clip.text_model(batch.input_ids).pooler_output)
        scale = clip.logit_scale.clamp(max=4.6052).exp()  # at most 100, as in the paper
        logits = scale * normalize(seen.float(), dim=-1) @ normalize(told.float(), dim=-1).T
        if batch.target is not None:
            hit = (logits.argmax(1) == batch.target).float().mean()
            return cross_entropy(logits, batch.target), {"name_top1": hit}
        own = torch.arange(len(logits), device=logits.device)
        hit = (logits.argmax(1) == own).float().mean()
        return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2, {"caption_top1": hit}

    def sample(self, step: int, folder: Path) -> list[Path]:
        """Draw nothing: this model has no pictures of its own."""
        return []

    def adapter(self, metrics: dict[str, Any]) -> Adapter:
        """Return the network."""
        return network_adapter(self.clip, "clip", metrics)
