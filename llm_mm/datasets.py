"""Built-in conversations about scenes of the embedded world, drawn by code from a fixed seed.

    pocket-questions   what pocket-llava was taught: ten kinds of questions about a picture
    pocket-scenes      a question that it was not: "how many things on what colour ?", answered as "two on red"

All things are known sprites; scenes of the test are others than those of the training.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from graft.llm_mm.conversations import Conversation, Turn
from graft.studio.config import suggest
from graft.studio.errors import DataError
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.questions import COUNTS, KINDS, Question, ask, question_scene
from graft.studio.pocket.scenes import Scene, render

NAMES = ("pocket-questions", "pocket-scenes")
SIZES = {"train": 1000, "val": 100, "test": 200}
"""Pictures of each part."""
ASKED = "how many things on what colour ?"


def built_in(name: str) -> list[Conversation]:
    """Returns a built-in set with declared parts.

    Raises:
        DataError: no such set.
    """
    if name not in NAMES:
        raise DataError(f"data.dataset = {name!r}", "there is no such built-in set", suggest(name, NAMES))
    return list(_drawn(name))


@lru_cache(maxsize=2)
def _drawn(name: str) -> tuple[Conversation, ...]:
    known, rows = Atlas.load().known, list[Conversation]()
    for place, (part, count) in enumerate(SIZES.items()):
        rng = np.random.default_rng([11, NAMES.index(name), place])
        for _ in range(count):
            scene = question_scene(rng, known)
            rows.append(_row(len(rows) + 1, scene, _questions(name, scene, rng, part), part))
    return tuple(rows)


def _questions(name: str, scene: Scene, rng: np.random.Generator, part: str) -> list[Question]:
    if name == "pocket-scenes":
        return [Question("scene", ASKED, f"{COUNTS[len(scene.things) - 1]} on {scene.colour}")]
    kinds = [str(kind) for kind in rng.permutation(KINDS)]
    found = [question for kind in kinds if (question := ask(scene, kind, rng, Atlas.load().known)) is not None]
    return found if part == "train" else found[:1]


def _row(number: int, scene: Scene, questions: list[Question], part: str) -> Conversation:
    turns = []
    for k, question in enumerate(questions):
        turns += [Turn("user", (*([0] if k == 0 else []), question.text)), Turn("assistant", (question.answer,))]
    kind = questions[0].kind if len(questions) == 1 else ""
    return Conversation(number, tuple(turns), (render(scene),), kind, (), part)
