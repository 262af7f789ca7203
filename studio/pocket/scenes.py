"""Scenes of the embedded world: one to three sprites on a coloured or textured background, with a caption.

A scene is data (which sprite, how large, where, on what), drawn by `render` and told by `caption`. Everything random
comes from the NumPy generator that the caller passes, so a seed names a data set and none needs to be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from graft.studio.pocket.atlas import Atlas

SIDE = 64
"""Side of a scene in pixels."""

COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (250, 215, 70),
    "green": (60, 160, 75),
    "teal": (40, 165, 160),
    "blue": (50, 100, 210),
    "purple": (130, 70, 180),
    "pink": (240, 150, 190),
    "brown": (125, 80, 45),
    "grey": (135, 140, 145),
    "black": (25, 25, 30),
    "white": (248, 248, 248),
}
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = tuple(range(16, 61, 4))
"""Sprite sides in pixels. Up to 28 is called small, from 44 large."""

OPENINGS = (
    "a picture of {}",
    "a photo of {}",
    "a drawing of {}",
    "an image of {}",
    "a close-up of {}",
    "a photo of the {bare}",
    "a picture of one {bare}",
    "the picture of {}",
    "an image of the {bare}",
    "a good photo of {}",
    "a nice drawing of the {bare}",
    "a bad photo of {}",
    "a painting of {}",
    "a sketch of the {bare}",
    "a rendering of {}",
    "an illustration of the {bare}",
    "an icon of {}",
    "a sticker of the {bare}",
    "a sticker with {}",
    "a photo of my {bare}",
    "a photo of some {bare}",
    "a photo that shows {}",
    "a picture with the {bare} in it",
    "this is {}",
    "this is the {bare}",
    "this shows {}",
    "it is the {bare}",
    "there is {}",
    "there is the {bare} here",
    "look at the {bare}",
    "look, {}",
    "we are looking at {}",
    "you are looking at the {bare}",
    "we see {}",
    "we see the {bare}",
    "we can find {} in this picture",
    "someone drew {}",
    "someone made a photo of the {bare}",
    "the thing in the picture is {}",
    "what you have before you is {}",
    "in this image we have the {bare}",
    "one {bare}",
    "the {bare}",
    "my {bare}",
)
"""Phrasings of captions; `opening` draws one of them or the name alone."""
UNSEEN_OPENING = "here you can see the {bare}"
"""A phrasing that no model is trained on; it is for zero-shot evaluation."""


@dataclass(frozen=True)
class Thing:
    """One sprite in a scene: its index in the atlas, its side and its upper left corner, in pixels."""

    sprite: int
    size: int
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """What is in a picture: one to three things, a background colour name and a texture name; its width in pixels."""

    things: tuple[Thing, ...]
    colour: str
    texture: str = "plain"
    width: int = SIDE


def sample_scene(
    rng: np.random.Generator, sprites: Sequence[int], objects: Sequence[float] = (0.7, 0.2, 0.1), smallest: int = 28
) -> Scene:
    """Draw a scene.

    Args:
        rng: source of all randomness.
        sprites: atlas indices to choose from.
        objects: probabilities of one, two and three things.
        smallest: side in pixels of the smallest sprite that stands alone. Sprites in company are 20 to 28 pixels.
    """
    count = 1 + int(rng.choice(len(objects), p=objects))
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    texture = TEXTURES[rng.integers(1, len(TEXTURES))] if rng.random() < 0.15 else "plain"
    chosen = rng.choice(sprites, size=count, replace=False)
    if count == 1:
        size = int(rng.choice([s for s in SIZES if s >= smallest]))
        x, y = (int(v) for v in rng.integers(0, SIDE - size + 1, size=2))
        return Scene((Thing(int(chosen[0]), size, x, y),), colour, texture)
    things = []
    for sprite, cell in zip(chosen, rng.choice(4, size=count, replace=False), strict=True):
        size = int(rng.choice([s for s in SIZES if 20 <= s <= 28]))
        x, y = (int(v) for v in rng.integers(0, SIDE // 2 - size + 1, size=2))
        things.append(Thing(int(sprite), size, x + SIDE // 2 * int(cell % 2), y + SIDE // 2 * int(cell // 2)))
    return Scene(tuple(things), colour, texture)


def centred(sprite: int, colour: str) -> Scene:
    """Return the plainest picture of a sprite: large, in the middle, on one colour. A bare name stands for it."""
    return Scene((Thing(sprite, 56, 4, 4),), colour)


def side_by_side(first: int, second: int, colour: str) -> Scene:
    """Return the plainest picture of two sprites, twice as wide as high: each `centred` in its half, the first left."""
    return Scene((Thing(first, 56, 4, 4), Thing(second, 56, SIDE + 4, 4)), colour, width=2 * SIDE)


def portrait(rng: np.random.Generator, sprite: int, colour: str | None = None) -> Scene:
    """Draw a scene with one large sprite near the middle, on a plain background."""
    size = int(rng.choice([s for s in SIZES if s >= 44]))
    margin = SIDE - size
    x, y = (int(v) for v in rng.integers(margin // 4, margin - margin // 4 + 1, size=2))
    return Scene((Thing(sprite, size, x, y),), colour or list(COLOURS)[rng.integers(len(COLOURS))])


@cache
def _scaled(sprite: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one sprite at one size: premultiplied colour (size, size, 3) and transparency (size, size, 1), uint16."""
    from PIL import Image

    pixels = Atlas.load().pixels[sprite].astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    filtering = Image.Resampling.BOX if size < 32 else Image.Resampling.BILINEAR
    planes = [np.asarray(Image.fromarray(pixels[..., k]).resize((size, size), filtering)) for k in range(4)]
    small = np.clip(np.stack(planes, axis=-1).round(), 0, 255).astype(np.uint16)
    return small[..., :3], 255 - small[..., 3:]


@cache
def _background(colour: str, texture: str, width: int) -> np.ndarray:
    """Return a (64, width, 3) uint16 background; not to be written to."""
    base = np.asarray(COLOURS[colour], np.int32)
    picture = np.broadcast_to(base, (SIDE, width, 3)).astype(np.int32)
    if texture != "plain":
        y, x = np.mgrid[:SIDE, :width]
        mark = {
            "striped": (x + y) // 6 % 2 == 0,
            "dotted": ((x % 12) - 6) ** 2 + ((y % 12) - 6) ** 2 < 9,
            "checked": (x // 8 + y // 8) % 2 == 0,
        }[texture]
        picture = picture + np.where(mark, 34 if base.mean() < 140 else -34, 0)[..., None]
    return np.clip(picture, 0, 255).astype(np.uint16)


def render(scene: Scene) -> np.ndarray:
    """Return the picture of a scene, (64, width, 3) uint8."""
    picture = _background(scene.colour, scene.texture, scene.width).copy()
    for thing in scene.things:
        colour, clear = _scaled(thing.sprite, thing.size)
        window = picture[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]
        window[:] = (window * clear + 127) // 255 + colour
    return np.minimum(picture, 255).astype(np.uint8)


def with_article(words: str) -> str:
    """Return the words behind "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def opening(rng: np.random.Generator) -> str:
    """Draw a phrasing: three in ten are the name alone, one in ten the name behind its article."""
    kind = rng.random()
    return "{bare}" if kind < 0.3 else "{}" if kind < 0.4 else OPENINGS[rng.integers(len(OPENINGS))]


def _sized(thing: Thing, name: str) -> str:
    return f"small {name}" if thing.size <= 28 else f"large {name}" if thing.size >= 44 else name


def _place(thing: Thing) -> str:
    """Say where a thing is on a 3 x 3 grid; nothing for the middle."""
    column, row = (int(3 * (corner + thing.size / 2) / SIDE) for corner in (thing.x, thing.y))
    words = [w for w in (("top", "", "bottom")[row], ("left", "", "right")[column]) if w]
    return " in the " + " ".join(words) if words else ""


def _relation(first: Thing, second: Thing) -> str:
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return one of many true captions of a scene; some leave out size, place or background."""
    names = Atlas.load().names
    if len(scene.things) == 1:
        thing = scene.things[0]
        name = names[thing.sprite]
        plain = (thing.size, thing.x, thing.y) == (56, 4, 4)
        words = _sized(thing, name) if rng.random() < (0.1 if plain else 0.6) else name
        text = opening(rng).format(with_article(words), bare=words)
        if rng.random() < 0.8:
            text += _place(thing)
    else:
        words_of = [with_article(names[t.sprite]) for t in scene.things]
        if len(words_of) == 2 and rng.random() < 0.5:
            text = f"{words_of[0]} {_relation(*scene.things)} {words_of[1]}"
        else:
            text = ", ".join(words_of[:-1]) + " and " + words_of[-1]
    if rng.random() < 0.5:
        ground = scene.colour if scene.texture == "plain" else f"{scene.texture} {scene.colour}"
        text += f" on {with_article(ground)} background"
    return text
