"""Sprites that never were, and words for them: they teach the UNet that there is more to draw than the known names.

A UNet that sees 900 sprites under 900 names for long enough has them by heart: every name comes out sharp, and no new
word can call for anything else. So its last training mixes in *variants*, known sprites halved together, mirrored,
turned and in other colours, each told by two pseudo-words that stand in its caption where a name would:

    e = W (f(x) - mean) / std,      f(x) = (class token, mean patch) of pocket-clip's image tower

As in ELITE (Wei et al., Encoding Visual Concepts into Textual Embeddings for Customized Text-to-Image Generation, 2023,
arXiv 2302.13848) a picture becomes rows of the token table; here the base itself learns to follow them. `x` shows the
variant in another place and on another ground than the picture that is drawn. Some pictures, twice as wide, show it
beside a known sprite that has its name in the caption. W is thrown away at the end: what stays is a UNet that follows a
word to a picture without a name, alone or in company, which is what Textual Inversion asks of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from graft.studio.pocket.atlas import SIZE, Atlas
from graft.studio.pocket.pretrain.draw import kept, on_device
from graft.studio.pocket.scenes import COLOURS, SIDE, Thing, centred, opening, portrait, side_by_side, with_article

MARK = "~"
"""A word of one token that no caption has: pseudo-words take its place."""
WORDS = 2
"""Pseudo-words of a picture."""
UNCHANGED = 0.2
"""Share of the pictures that show a known sprite as it is: so the pseudo-words stay near the names."""


def variant(rng: np.random.Generator, sprites: Sequence[int]) -> np.ndarray:
    """Return the pixels of a sprite made of one or two of the given ones, (64, 64, 4) uint8 with straight alpha."""
    pixels = Atlas.load().pixels[int(rng.choice(sprites))]
    if rng.random() < 0.5:
        other = Atlas.load().pixels[int(rng.choice(sprites))]
        cut = int(rng.integers(SIZE // 3, SIZE * 2 // 3))
        low = np.arange(SIZE) >= cut
        pixels = np.where((low[:, None] if rng.random() < 0.5 else low[None])[..., None], other, pixels)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.2:
        pixels = pixels[::-1]
    if rng.random() < 0.2:
        pixels = np.rot90(pixels)
    if rng.random() < 0.6:
        turned = np.clip(pixels[..., :3] @ _hue_turn(rng.uniform(0.6, 5.7)).T, 0, 255)
        pixels = np.concatenate([turned, pixels[..., 3:]], axis=-1)
    return np.ascontiguousarray(pixels).astype(np.uint8)


def _hue_turn(angle: float) -> np.ndarray:
    """Return the rotation of colours about grey by an angle in radians, (3, 3): Rodrigues' formula."""
    axis = np.full(3, 3**-0.5)
    cross = np.cross(np.eye(3), axis)  # v -> axis x v
    return np.eye(3) * np.cos(angle) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(axis, axis)


def placed(colour: str, *things: tuple[np.ndarray, Thing]) -> Tensor:
    """Return sprites' pixels, as large and where their things say, on one colour: (3, 64, 64 x things) in [-1, 1]."""
    from PIL import Image

    layer = Image.new("RGBA", (SIDE * len(things), SIDE))
    for pixels, thing in things:
        # premultiplied, or the resampling would bleed hidden colours into the edge
        size = (thing.size, thing.size)
        small = Image.fromarray(pixels).convert("RGBa").resize(size, Image.Resampling.BILINEAR).convert("RGBA")
        layer.paste(small, (thing.x, thing.y))
    ground = Image.new("RGBA", layer.size, (*COLOURS[colour], 255))
    picture = np.asarray(Image.alpha_composite(ground, layer).convert("RGB"))
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)


class Variants(NamedTuple):
    """Pictures to draw as latents (n, 16, 8, 8 or 16), what the image tower sees (n, 2 d), and ground colours (n,).

    `company` (n, 1 or 2) are the atlas indices of what is drawn from left to right; negative for the variant.
    """

    latents: Tensor
    features: Tensor
    colours: Tensor
    company: Tensor

    def caption(self, row: int, rng: np.random.Generator) -> str:
        """Return one of many captions of a row, with marks where the name would be."""
        name = " ".join([MARK] * WORDS)
        company: list[int] = self.company[row].tolist()
        if len(company) == 1:
            text = opening(rng).format(with_article(name), bare=name)
        else:
            first, second = (with_article(name if k < 0 else Atlas.load().names[k]) for k in company)
            text = f"{first} {'and' if rng.random() < 0.5 else 'left of'} {second}"
        if rng.random() < 0.6:
            text += f" on {with_article(list(COLOURS)[int(self.colours[row])])} background"
        return text


@torch.no_grad()
def cached_variants(vae: Any, tower: Any, count: int, folder: Path, seed: int = 12, paired: bool = False) -> Variants:
    """Return `count` variants of known sprites, as posterior means; computed once and kept in `folder`.

    Args:
        vae: the frozen autoencoder.
        tower: the frozen image tower.
        count: how many.
        folder: where they are kept.
        seed: of all that is drawn.
        paired: each stands beside a known sprite, in a picture twice as wide.
    """

    def make() -> dict[str, Tensor]:
        rng, known, names = np.random.default_rng(seed), Atlas.load().known, list(COLOURS)
        latents, features, colours = [], [], rng.integers(len(names), size=count)
        company = np.full((count, 1 + paired), -1)
        if paired:
            company[np.arange(count), rng.integers(2, size=count)] = rng.choice(known, size=count)
        for start in range(0, count, 100):
            drawn, seen = [], []
            for row, colour in enumerate(colours[start : start + 100], start):
                as_it_is = rng.random() < UNCHANGED
                pixels = Atlas.load().pixels[int(rng.choice(known))] if as_it_is else variant(rng, known)
                things = (centred(0, "") if rng.random() < 0.5 else portrait(rng, 0)).things
                if paired:
                    first, second = company[row].tolist()
                    things = side_by_side(first, second, "").things
                parts = [pixels if k < 0 else Atlas.load().pixels[k] for k in company[row]]
                drawn.append(placed(names[colour], *zip(parts, things, strict=True)))
                seen.append(placed(names[rng.integers(len(names))], (pixels, centred(0, "").things[0])))
            latents.append(vae.encode(on_device(torch.stack(drawn), vae)).latent_dist.mean.half().cpu())
            states = tower(on_device(torch.stack(seen), tower)).last_hidden_state
            features.append(torch.cat([states[:, 0], states[:, 1:].mean(1)], dim=1).cpu())
        found = {"latents": torch.cat(latents), "features": torch.cat(features)}
        return found | {"colours": torch.from_numpy(colours), "company": torch.from_numpy(company)}

    return Variants(**kept(folder, "variants", (vae, tower, count, seed, paired), make))


class PseudoWords(nn.Module):
    """The map from what the image tower sees to rows of the text tower's token table.

    Args:
        text_encoder: the frozen text tower.
        mark: token id whose rows are replaced.
        features: (n, f), for their mean and spread.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, text_encoder: Any, mark: int, features: Tensor):
        super().__init__()
        self.text_encoder, self.mark = (text_encoder,), mark  # a tuple hides it from parameters()
        table = text_encoder.get_input_embeddings().weight
        self.map = nn.Linear(features.shape[1], WORDS * table.shape[1])
        with torch.no_grad():
            self.map.weight.mul_(table.std())  # words of the table's own length
            self.map.bias.zero_()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("std", features.std(0) + 1e-4)

    def context(self, input_ids: Tensor, features: Tensor) -> Tensor:
        """Return the text tower's output (b, n, d); the marks in `input_ids`, in order, are the words of `features`."""
        words = self.map((features - self.mean) / self.std)
        marked = input_ids == self.mark

        def put(table: nn.Module, given: tuple[Tensor, ...], rows: Tensor) -> Tensor:
            return rows.index_put((marked,), words.view(-1, rows.shape[-1]).to(rows.dtype))

        hook = self.text_encoder[0].get_input_embeddings().register_forward_hook(put)
        try:
            output: Tensor = self.text_encoder[0](input_ids).last_hidden_state
        finally:
            hook.remove()
        return output
