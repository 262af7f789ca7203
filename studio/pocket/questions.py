"""Questions about scenes, each with one short answer: what `pocket-llava` is trained and measured on.

A question is asked only where its answer is beyond doubt: sizes in between, places near a border and things that stand
diagonally are left out. Answers are spread so that they cannot be guessed without the picture: textures and counts come
equally often, every second thing asked for is absent, and half of those absent look like one that is there. Names come
from the sprites that the caller passes and from nowhere else, so the two sides of the split never meet in a question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.scenes import SIDE, TEXTURES, Scene, Thing, sample_scene, with_article

COUNTS = ("one", "two", "three")
LOOKALIKES = 8
"""From how many of the most similar sprites an absent thing is drawn."""

PHRASES: dict[str, tuple[str, ...]] = {
    "colour": (
        "what colour is the background ?",
        "which colour is the background ?",
        "what is the background colour ?",
        "tell me the colour of the background",
        "the background is of what colour ?",
    ),
    "texture": (
        "what pattern has the background ?",
        "which pattern is on the background ?",
        "what is the pattern of the background ?",
        "is the background plain striped dotted or checked ?",
        "tell me the pattern of the background",
    ),
    "count": (
        "how many things are there ?",
        "how many things are in the picture ?",
        "how many things do you see ?",
        "count the things",
        "what is the number of things ?",
    ),
    "exists": (
        "is there {a} ?",
        "is there {a} in the picture ?",
        "do you see {a} ?",
        "does the picture show {a} ?",
        "can you find {a} ?",
    ),
    "name": (
        "what is this ?",
        "what is in the picture ?",
        "what do you see ?",
        "name the thing in the picture",
        "which thing is this ?",
    ),
    "size": (
        "is the {name} small or large ?",
        "how large is the {name} ?",
        "what size has the {name} ?",
        "tell me the size of the {name}",
    ),
    "place": (
        "where is the {name} ?",
        "where in the picture is the {name} ?",
        "in which place is the {name} ?",
        "tell me where the {name} is",
    ),
    "at": (
        "what is in the {place} ?",
        "which thing is in the {place} ?",
        "what do you see in the {place} ?",
        "name the thing in the {place}",
    ),
    "beside": (
        "what is {side} the {name} ?",
        "which thing is {side} the {name} ?",
        "what do you see {side} the {name} ?",
        "name the thing {side} the {name}",
    ),
    "side": (
        "on which side of the {other} is the {name} ?",
        "where is the {name} seen from the {other} ?",
        "seen from the {other} where is the {name} ?",
    ),
}
"""Phrasings of each kind of question. "?" stands alone, as all words do."""
KINDS = tuple(PHRASES)


@dataclass(frozen=True)
class Question:
    """A question of one kind, and its only right answer."""

    kind: str
    text: str
    answer: str


def question_scene(rng: np.random.Generator, sprites: Sequence[int]) -> Scene:
    """Draw a scene to ask about: two in five with one thing, all textures equally often."""
    scene = sample_scene(rng, sprites, objects=(0.4, 0.3, 0.3), smallest=20)
    return replace(scene, texture=TEXTURES[rng.integers(len(TEXTURES))])


def ask(scene: Scene, kind: str, rng: np.random.Generator, sprites: Sequence[int]) -> Question | None:
    """Draw a question of one kind, or return None where the scene leaves it no clear answer.

    Args:
        scene: what is asked about.
        kind: one of `KINDS`.
        rng: source of all randomness.
        sprites: atlas indices of the things that may be asked for in vain; the side of the split that the scene is of.
    """
    found = _FINDERS[kind](scene, rng, tuple(sprites))
    if found is None:
        return None
    answer, words = found
    phrases = PHRASES[kind]
    return Question(kind, phrases[rng.integers(len(phrases))].format(**words), answer)


def place_of(thing: Thing) -> str | None:
    """Return where a thing is on a 3 x 3 grid, "middle" or "top left"; None within 2 pixels of a border."""
    words = []
    for corner, names in ((thing.y, ("top", "", "bottom")), (thing.x, ("left", "", "right"))):
        centre = corner + thing.size / 2
        if min(abs(centre - SIDE / 3), abs(centre - SIDE * 2 / 3)) < 2:
            return None
        words.append(names[int(3 * centre / SIDE)])
    return " ".join(word for word in words if word) or "middle"


def side_of(first: Thing, second: Thing) -> str | None:
    """Return on which side of the second thing the first is; None where they stand diagonally."""
    dx = first.x + first.size / 2 - second.x - second.size / 2
    dy = first.y + first.size / 2 - second.y - second.size / 2
    if max(abs(dx), abs(dy)) < 2 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


Found = tuple[str, dict[str, str]] | None
"""An answer and the words of its question."""


def _name(thing: Thing) -> str:
    return Atlas.load().names[thing.sprite]


def _pick(scene: Scene, rng: np.random.Generator) -> Thing:
    return scene.things[rng.integers(len(scene.things))]


def _colour(scene: Scene, rng: np.random.Generator, sprites: tuple[int, ...]) -> Found:
    return scene.colour, {}


def _texture(scene: Scene, rng: np.random.Generator, sprites: tuple[int, ...]) -> Found:
    return (scene.texture, {}) if scene.things[0].size <= 48 else None  # larger ones leave too little of it


def _count(scene: Scene, rng: np.random.Generator, sprites: tuple[int, ...]) -> Found:
    return COUNTS[len(scene.things) - 1], {}


def _exists(scene: Scene, rng: np.random.Generator, sprites: tuple[int, ...]) -> Found:
    thing = _pick(scene, rng)
    if rng.random() < 0.5:
        return "yes", {"a": with_article(_name(thing))}
    there = {t.sprite for t in scene.things}
    drawn = _lookalikes(sprites)[thing.sprite] if rng.random() < 0.5 else rng.choice(sprites, LOOKALIKES)
    absent = [int(s) for s in drawn if int(s) not in there]
    if not absent:
        return None
    return "no", {"a": with_article(Atlas.load().names[absent[rng.integers(len(absent))]])}


def _single(scene: Scene, rng: np.random.Generator, sprites: tuple[int, ...]) -> Found:
    thing = scene.things[0]
    return (_name(thing), {}) if len(scene.things) == 1 and thing.size >= 28 else None


def _size(scene: Scene, rng: np.random.Generator, sprites: tuple[int, ...]) -> Found:
    thing = scene.things[0]
    # of the sizes of things that stand alone, three are small and five large
    if len(scene.things) > 1 or 28 < thing.size < 44 or (thing.size >= 44 and rng.random() > 0.6):
        return None
    return "small" if thing.size <= 28 else "large", {"name": _name(thing)}


def _place(scene: Scene, rng: np.random.Generator, sprites: tuple[int, ...]) -> Found:
    thing = _pick(scene, rng)
    place = place_of(thing) if thing.size <= 32 else None  # larger ones are nearly always in the middle
    return (place, {"name": _name(thing)}) if place else None


def _at(scene: Scene, rng: np.random.Generator, sprites: tuple[int, ...]) -> Found:
    thing = _pick(scene, rng)
    place = place_of(thing)
    alone = [place_of(t) for t in scene.things].count(place) == 1
    if len(scene.things) == 1 or place is None or " " not in place or not alone:
        return None
    return _name(thing), {"place": place}


def _beside(scene: Scene, rng: np.random.Generator, sprites: tuple[int, ...]) -> Found:
    anchor = _pick(scene, rng)
    others = [t for t in scene.things if t != anchor]
    sides = [side_of(t, anchor) for t in others]
    if not others or None in sides or len(set(sides)) < len(sides):
        return None
    k = rng.integers(len(others))
    words = {"left": "left of", "right": "right of"}
    side = str(sides[k])
    return _name(others[k]), {"side": words.get(side, side), "name": _name(anchor)}


def _side(scene: Scene, rng: np.random.Generator, sprites: tuple[int, ...]) -> Found:
    if len(scene.things) == 1:
        return None
    first, second = (scene.things[int(k)] for k in rng.choice(len(scene.things), 2, replace=False))
    side = side_of(first, second)
    return (side, {"name": _name(first), "other": _name(second)}) if side else None


_FINDERS: dict[str, Callable[[Scene, np.random.Generator, tuple[int, ...]], Found]] = {
    "colour": _colour,
    "texture": _texture,
    "count": _count,
    "exists": _exists,
    "name": _single,
    "size": _size,
    "place": _place,
    "at": _at,
    "beside": _beside,
    "side": _side,
}


@cache
def _lookalikes(sprites: tuple[int, ...]) -> dict[int, list[int]]:
    """Return the most similar of the given sprites to each of them, by 8 x 8 pixels on grey."""
    stack = Atlas.load().pixels[list(sprites)].astype(np.float32) / 255
    flat = stack[..., :3] * stack[..., 3:] + 0.5 * (1 - stack[..., 3:])
    flat = flat.reshape(len(sprites), 8, 8, 8, 8, 3).mean((2, 4)).reshape(len(sprites), -1)
    square = (flat**2).sum(1)
    distance = square[:, None] + square[None] - 2 * flat @ flat.T
    np.fill_diagonal(distance, np.inf)
    order = np.argsort(distance, axis=1)[:, :LOOKALIKES]
    return {sprite: [sprites[int(k)] for k in row] for sprite, row in zip(sprites, order, strict=True)}
