r"""Pivotal tuning: a new word and low-rank factors, learnt together from a few pictures.

The word's rows v carry what the text encoder can say of the concept, the factors what it cannot; beside LoRA alone the
trigger means nothing else, beside Textual Inversion alone the denoiser may change. The name is from Daniel Roich, Ron
Mokady, Amit H. Bermano, Daniel Cohen-Or: Pivotal Tuning for Latent-based Editing of Real Images, 2021,
arXiv:2106.05744, where a code is found first and the generator tuned around it:

    min over v, A, B of  E || target(x) - denoiser_{A, B}(x_t, t, text(prompt, v)) ||^2
                         + prior_weight * E || target(x') - denoiser_{A, B}(x'_t, t, text(class_prompt)) ||^2

Differs from it in what diffusion trainers have made of it: word and factors are trained at the same time, the word
`word_rate` times as fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.diffusion.lora import DiffusionLoRA
from graft.diffusion.method import Encode, Work
from graft.diffusion.task import row_slots
from graft.diffusion.textual_inversion import ENCODERS, TextualInversion, attach_concepts
from graft.diffusion.words_and_weights import WordsAndWeights
from graft.studio.adapter import Adapter
from graft.studio.config import from_dict, require
from graft.studio.errors import InputError
from graft.studio.sites import Plan

if TYPE_CHECKING:
    from graft.diffusion.base import Condition, DiffusionBase
    from graft.studio.adapter import Card


@dataclass(frozen=True)
class PivotalTuning(DiffusionLoRA):
    """A new word together with LoRA.

    Example:
        >>> handle = PivotalTuning(trigger="<sprout>", rank=4).attach_words(base)  # doctest: +SKIP
    """

    trigger: str = "<concept>"
    """The new word, in lower case, without spaces. Put it into prompts."""
    vectors: int = 2
    """Rows learnt for it."""
    initializer: str | None = None
    """Words whose rows the vectors start from, dealt out in turn; None draws random rows of the table's spread."""
    word_rate: float = 3.0
    """Learning rate of the word over that of the factors."""

    own = frozenset({"trigger", "class_prompt", "class_path", "vectors", "initializer"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require("method.word_rate", self.word_rate, self.word_rate >= 0, "0 or more")
        _ = self.word

    @property
    def word(self) -> TextualInversion:
        """The word as Textual Inversion has it."""
        return TextualInversion(token=self.trigger, vectors=self.vectors, initializer=self.initializer)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The new word."""
        return (self.trigger,)

    def prompts(self, caption: str | None) -> list[str]:
        """Training prompts of a picture: its own caption, which must contain the word, or the templates."""
        return self.word.prompts(caption)

    @classmethod
    def attach_jobs(cls, work: Work) -> tuple[WordsAndWeights, Encode]:
        """Attaches a word and factors for each job; the text encoder runs at every step, on the prompts that occur."""
        base, methods = work.base, [subject.method for subject in work.subjects]
        handle = _attach(base, methods, [subject.job.train.seed for subject in work.subjects])
        handle.route(row_slots(work.sources) if len(methods) > 1 else None)
        ids = base.tokenize([handle.spoken(slot, text) for slot, text in work.table.entries])
        slots = torch.tensor([slot for slot, _ in work.table.entries])

        def encode(rows: Tensor) -> Condition:
            """The text encoder sees prompts, the denoiser rows: each gets its own route."""
            of_batch = handle.routed
            if of_batch is not None and methods[0].text_encoder:
                handle.route(slots[rows])
            condition = base.condition(ids[rows])
            handle.route(of_batch)
            return condition

        return handle, encode

    def attach_words(self, base: DiffusionBase, seed: int = 0) -> WordsAndWeights:
        """Adds word and factors to a base, which draws as before whatever does not name the word."""
        return _attach(base, [self], [seed])

    @classmethod
    def attach_to(cls, base: Any, tensors: Mapping[str, Tensor], card: Card) -> WordsAndWeights:  # type: ignore[override]
        """Attaches a trained adapter to its base.

        Raises:
            FormatError: tensors that do not fit.
        """
        method = from_dict(cls, card.config, "adapter.json")
        return _attach(base, [method], [0], Plan.from_list(card.sites)).restored(tensors)

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes the LoRA for diffusers or kohya, and the word's rows beside it: a file for each text encoder, for
        `pipe.load_textual_inversion`; for kohya, with two text encoders, one file for both."""
        from graft.studio.formats import custom_diffusion, diffusers, kohya, provenance
        from graft.studio.formats.textual_inversion import write_together

        writers = {"diffusers": diffusers.export, "kohya": kohya.export}
        if format not in writers:
            reason = "a word with a LoRA is not written in it"
            raise InputError(f"format {format!r}", reason, f"use native, {', '.join(writers)}")
        token, factors = str(adapter.card.config["trigger"]), dict(adapter.tensors)
        rows = {name: factors.pop(key) for name in ENCODERS if (key := f"{name}.{token}") in factors}
        header = provenance.header(adapter.card)
        told = {**adapter.card.details, "provenance": header}  # the file of the LoRA says what both are of
        paths = writers[format](Adapter(factors, replace(adapter.card, method="lora", details=told)), folder)
        if format == "kohya" and len(rows) > 1:
            return [*paths, write_together(folder, token, rows, header)]
        return [*paths, *custom_diffusion.write_word(folder, token, rows, header)]


def _attach(
    base: DiffusionBase, methods: Sequence[PivotalTuning], seeds: Sequence[int], plan: Plan | None = None
) -> WordsAndWeights:
    """A slot for each method. In a shared batch, where jobs may have chosen the same word, each gets its own."""
    words = [method.word for method in methods]
    if len(methods) > 1:
        words = [replace(word, token=f"<graft-{slot}>") for slot, word in enumerate(words)]
    weights = methods[0].attach(base.modules, slots=len(methods), plan=plan)
    for slot, seed in enumerate(seeds):
        weights.reset(slot, seed)
    try:
        return WordsAndWeights(attach_concepts(base, words, seeds), weights, methods, [[word.token] for word in words])
    except InputError:
        weights.detach()
        raise
