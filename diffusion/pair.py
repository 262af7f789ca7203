"""The pair by which a concept is judged, fidelity and alignment, and the score of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from graft.diffusion.data import DataConfig, load_dataset
from graft.diffusion.features import Clip, Eye
from graft.diffusion.image_encoder import as_picture
from graft.diffusion.measures import background_alignment, harmonic, image_similarity
from graft.diffusion.previews import draw
from graft.diffusion.validation import held_out
from graft.studio.caches import Cache
from graft.studio.errors import InputError

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase
    from graft.diffusion.evaluation import EvaluationConfig

LOOKED_AT = 224
"""Side of real pictures as models look at them."""


class Pair:
    """Fidelity and alignment of one concept.

    Args:
        settings: prompts and seeds.
        clip: compares with pictures and prompts; None leaves both out.
        eye: compares with pictures; None leaves that out.
        real: pictures of the concept.
    """

    def __init__(self, settings: EvaluationConfig, clip: Clip | None, eye: Eye | None, real: Sequence[Image.Image]):
        self.settings, self.clip, self.eye = settings, clip, eye
        self.looks: dict[str, tuple[Clip | Eye, Tensor]] = {}
        for name, model in (("image_similarity", clip), ("dino_similarity", eye)):
            if model is not None:
                self.looks[name] = model, model.images(real)

    def measure(self, word: str, drawing: Callable[[list[str], range], Any]) -> dict[str, float]:
        """Draws a word's prompts, and measures.

        Args:
            word: stands for the concept.
            drawing: of prompts and seeds.
        """
        settings, seeds = self.settings, range(self.settings.seeds)
        figures: dict[str, float] = {}
        if self.looks:
            plain: list[Image.Image] = sum(drawing([prompt.format(word) for prompt in settings.prompts], seeds), [])
            figures |= {name: image_similarity(model.images(plain), real) for name, (model, real) in self.looks.items()}
        asked = [colour for colour in settings.colours for _ in seeds]
        coloured = [settings.background.format(word, colour=colour) for colour in settings.colours]
        pictures: list[Image.Image] = sum(drawing(coloured, seeds), [])
        if self.clip is not None:
            told = [settings.background.format(settings.class_word, colour=colour) for colour in asked]
            figures["text_alignment"] = float((self.clip.images(pictures) * self.clip.texts(told)).sum(-1).mean())
        return figures | {"background_alignment": background_alignment(pictures, asked)}


class Yardstick:
    """Scores a concept while it is learnt, by the pair relative to what can be had.

    Fidelity is image similarity over that of the real pictures with each other; alignment is text alignment over that
    of the plain base with the class word. The score is their harmonic mean, so that neither makes up for the other.

    Args:
        base: nothing may be attached to it.
        settings: pictures, prompts, seeds and models.

    Raises:
        InputError: no model is named that measures both.
    """

    def __init__(self, base: DiffusionBase, settings: EvaluationConfig):
        clip, eye = settings.models(base)
        if clip is None or (settings.fidelity == "dino" and eye is None):
            name = "eval.clip" if clip is None else "eval.dino"
            reason = f"the pair is measured by a model, and none is named for {base.name}"
            raise InputError(name, reason, "Name one, or leave train.measure_every at 0")
        real = real_pictures(settings.data, settings.held_out)
        self.pair = Pair(settings, clip, eye if settings.fidelity == "dino" else None, real)
        self.drawing = settings.drawing
        self.name = "dino_similarity" if settings.fidelity == "dino" else "image_similarity"
        own = self.pair.looks[self.name][1]
        among = own @ own.T
        self.most = float((among.sum() - among.trace()) / (len(own) * (len(own) - 1))) if len(own) > 1 else 1.0
        plain = self.pair.measure(settings.class_word, partial(draw, base, config=settings.drawing))
        self.usual = plain["text_alignment"]

    def score(self, word: str, drawing: Callable[[list[str], range], Any]) -> dict[str, float]:
        """The figures of `Pair.measure`, with `fidelity`, `alignment` and `score`."""
        figures = self.pair.measure(word, drawing)
        fidelity = figures[self.name] / max(self.most, 1e-9)
        alignment = figures["text_alignment"] / max(self.usual, 1e-9)
        return figures | {"fidelity": fidelity, "alignment": alignment, "score": harmonic(fidelity, alignment)}


def real_pictures(data: DataConfig, share: float) -> list[Image.Image]:
    """A folder's pictures, or those that a share holds out, upright, as models look at them."""
    found = load_dataset(data, LOOKED_AT, Cache())
    places = held_out(found.pictures, share) if share else range(len(found.pictures))
    return [as_picture(found.pixels[place, 0]) for place in places]
