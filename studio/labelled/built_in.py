"""Built-in sets of labelled pictures, drawn by code from a fixed seed, so that none is stored or fetched.

    pocket-new       50 sprites that no embedded model has seen, in random scenes: new classes
    pocket-colour    the background's colour, whatever stands on it: 12 classes
    pocket-count     how many things there are: 1, 2 or 3
    drawn-digits     ten digits of a sans-serif font, turned, sheared, noisy
    digits           1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak, 1998), by scikit-learn if installed

Training and test pictures are drawn with different seeds. Scenes of colour and count are made of known sprites, of
which those of the test are others than those of the training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from graft.studio.config import suggest
from graft.studio.errors import DataError, InputError
from graft.studio.labelled.sources import Item, Source
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.scenes import COLOURS, render, sample_scene

NAMES = ("pocket-new", "pocket-colour", "pocket-count", "drawn-digits", "digits")
TRAIN, TEST = 1200, 600
"""Pictures of each built-in set but digits."""
NEW_CLASSES = 50
"""Of pocket-new."""


def built_in(name: str) -> Source:
    """Returns a built-in set with declared training and test parts.

    Raises:
        DataError: no such set, or its library is missing.
    """
    if name not in NAMES:
        raise DataError(f"data.dataset = {name!r}", "there is no such built-in set", suggest(name, NAMES))
    images, labels, tested = _digits() if name == "digits" else _drawn(name)
    parts = ["test" if each else ("" if name == "digits" else "train") for each in tested]
    items = [Item(str(k), label, part) for k, (label, part) in enumerate(zip(labels, parts, strict=True))]
    return Source(name, items, lambda row: images[int(row)])


@lru_cache(maxsize=4)
def _drawn(name: str) -> tuple[np.ndarray, list[str], list[bool]]:
    """Pictures (n, h, w[, 3]) uint8, labels, and which are for the test; no picture twice."""
    pictures: dict[bytes, tuple[np.ndarray, str, bool]] = {}
    for test in (False, True):
        rng, draw = np.random.default_rng([7, NAMES.index(name), test]), _drawer(name, test)
        for k in range(TEST if test else TRAIN):
            image, label = draw(k, rng)
            while image.tobytes() in pictures:
                image, label = draw(k, rng)
            pictures[image.tobytes()] = image, label, test
    images, labels, tested = zip(*pictures.values(), strict=True)
    return np.stack(images), list(labels), list(tested)


def _drawer(name: str, test: bool) -> Callable[[int, np.random.Generator], tuple[np.ndarray, str]]:
    """What draws picture k of a set, with its label."""
    atlas = Atlas.load()
    known: Any = np.array([s for i, s in enumerate(atlas.known) if (i % 3 == 0) is test])  # faster than a list
    fresh = atlas.new[:: len(atlas.new) // NEW_CLASSES][:NEW_CLASSES]

    def new(k: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        sprite = fresh[k % len(fresh)]
        return render(sample_scene(rng, [sprite], objects=(1.0,))), atlas.names[sprite]

    def colour(k: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        word = list(COLOURS)[k % len(COLOURS)]
        return render(replace(sample_scene(rng, known), colour=word)), word

    def count(k: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        # Two of three things are taken away again: size and place do not tell how many there are.
        scene = sample_scene(rng, known, objects=(0.0, 0.0, 1.0))
        return render(replace(scene, things=scene.things[: 1 + k % 3])), str(1 + k % 3)

    def digit(k: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        return _digit(k % 10, rng), str(k % 10)

    return {"pocket-new": new, "pocket-colour": colour, "pocket-count": count, "drawn-digits": digit}[name]


def _digit(digit: int, rng: np.random.Generator) -> np.ndarray:
    """A digit of random size, place, turn, shear, contrast and noise, (32, 32) uint8."""
    sheet = Image.new("L", (48, 48))
    font = ImageFont.load_default(float(rng.integers(22, 38)))
    ImageDraw.Draw(sheet).text((24, 24), str(digit), 255, font, anchor="mm")
    angle, shear = np.deg2rad(rng.normal(0, 12)), rng.normal(0, 0.2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, shear], [0, 1]]
    shift = 24 - turn @ (24 + rng.normal(0, 2, 2))
    moved = sheet.transform(
        (48, 48), Image.Transform.AFFINE, (*turn[0], shift[0], *turn[1], shift[1]), Image.Resampling.BILINEAR
    )
    picture = np.asarray(moved.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    low, high = rng.uniform(0, 0.4), rng.uniform(0.6, 1)
    noisy = low + (high - low) * picture + rng.normal(0, 0.08, picture.shape)
    return np.clip(255 * noisy, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, list[str], list[bool]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        remedy = "Run: pip install scikit-learn. drawn-digits needs no library"
        raise InputError("data.dataset = 'digits'", "scikit-learn is not installed", remedy) from error
    found = load_digits()
    images = (found.images * (255 / 16)).round().astype(np.uint8)
    return images, [str(label) for label in found.target], [False] * len(images)
