"""How well a multimodal language model answers questions about scenes: exact match, by kind of question.

With `shuffled` every question comes with the picture of another scene. What is right then was guessed, so a figure
means something only beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.questions import KINDS, Question, ask
from graft.studio.pocket.scenes import Scene, render


class Score(NamedTuple):
    """Right answers and questions of one kind."""

    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        """The share of right answers; not a number where nothing was asked."""
        return self.right / self.asked if self.asked else float("nan")


def exact_match(
    model: Any,
    processor: Any,
    scenes: Sequence[Scene],
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    shuffled: bool = False,
    sprites: Sequence[int] | None = None,
) -> dict[str, Score]:
    """Ask one question of each kind about each scene and count the answers that are right to the letter.

    Args:
        model: a `LlavaForConditionalGeneration`.
        processor: its `LlavaProcessor`.
        scenes: what is asked about.
        kinds: of questions; a scene that gives a kind no clear answer is left out of its count.
        seed: of phrasings and of the things asked for.
        shuffled: show the next scene's picture instead.
        sprites: from which absent things are drawn; None takes the known ones.
    """
    rng = np.random.default_rng(seed)
    sprites = Atlas.load().known if sprites is None else sprites
    questions: list[Question] = []
    shown: list[np.ndarray] = []
    for k, scene in enumerate(scenes):
        picture = render(scenes[(k + 1) % len(scenes)] if shuffled else scene)
        asked = [question for kind in kinds if (question := ask(scene, kind, rng, sprites)) is not None]
        questions += asked
        shown += [picture] * len(asked)
    answers = answer(model, processor, shown, [question.text for question in questions])
    hits = [(q.kind, given == q.answer) for q, given in zip(questions, answers, strict=True)]
    return {kind: Score(hits.count((kind, True)), sum(k == kind for k, _ in hits)) for kind in kinds}


def mean_accuracy(scores: dict[str, Score]) -> float:
    """Return the mean of the kinds' accuracies: each kind counts the same, however often it was asked."""
    return float(np.mean([score.accuracy for score in scores.values() if score.asked]))


@torch.no_grad()
def answer(
    model: Any, processor: Any, shown: Sequence[np.ndarray], questions: Sequence[str], batch_size: int = 100
) -> list[str]:
    """Return the greedy answers to questions about pictures (h, w, 3) uint8, one question for each picture."""
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        part = slice(start, start + batch_size)
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
            for text in questions[part]
        ]
        prompts = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(images=list(shown[part]), text=prompts, padding=True, return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        answers += processor.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return answers
