"""Prompts with vectors in place of words: where they stand in every class's row, and the rows' features.

Layouts, with n_i tokens in the name of class i (Zhou et al. 2021, arXiv:2109.01134):

    end      [start] [context] [name] [.] [end]
    middle   [start] [half of the context] [name] [other half] [.] [end]
    front    [start] [name] [context] [.] [end]

Tokenizers without a start mark leave it out; those that drop punctuation drop the full stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graft.vlm.base import ClipBase
from graft.vlm.text import CHUNK, Words

POSITIONS = ("end", "middle", "front")


def context_of(base: ClipBase, words: str) -> Tensor:
    """Embeddings of words, (m, d): as many vectors as the tokenizer makes of them, not as there are words."""
    ids = torch.tensor(base.words.content(words), device=base.device)
    return base.text_tower().embed(ids).detach().float()


class PromptTable:
    """The frozen part of every class's prompt, and where the context goes.

    Args:
        base: its text tower must be known.
        names: of the classes.
        length: vectors of the context.
        position: `end`, `middle` or `front`.

    Raises:
        DataError: a name that does not fit behind the context.
        InputError: a text tower that is not known.
    """

    def __init__(self, base: ClipBase, names: Sequence[str], length: int, position: str = "end"):
        self.tower = tower = base.text_tower()
        filler = base.words.content("a")[0]
        layouts = [_layout(base.words, name, length, position) for name in names]
        rows = [
            base.words.row([filler if i < 0 else i for i in ids], name)
            for ids, name in zip(layouts, names, strict=True)
        ]
        ids = torch.tensor(rows, device=base.device)
        self.at = tower.at(ids)
        cut = int(self.at.max()) + 1 if tower.cuttable else tower.length
        self.slots = torch.zeros_like(ids)  # (c, n): 1 + number of the context vector, 0 for none
        start = len(base.words.start)
        for row, layout in zip(self.slots, layouts, strict=True):
            row[start : start + len(layout)] = torch.tensor([-i if i < 0 else 0 for i in layout])
        self.slots = self.slots[:, :cut]
        with torch.no_grad():
            self.frozen = tower.embed(ids[:, :cut]).float() * (self.slots == 0)[..., None]
        ahead = {"end": length, "middle": length // 2, "front": 0}[position]
        self.shared, self.start = start + ahead, start

    def features(self, context: Tensor, chunk: int = CHUNK) -> Tensor:
        """Features of every class, not normalised.

        Args:
            context: (g, m, d), one context per group (a group per picture, or one for all).
            chunk: tokens that are worked on at once.

        Returns:
            (g, c, e).
        """
        table = torch.cat([torch.zeros_like(context[:, :1]), context], dim=1)  # (g, 1 + m, d)
        if not self.tower.shares or not self.shared:
            return self._whole(self.frozen + table[:, self.slots], chunk)
        p = self.shared
        prefix = self.frozen[0, :p] + table[:, self.slots[0, :p]]
        suffix, places = self.frozen[:, p:], self.slots[:, p:]
        if bool(places.any()):  # some of the context stands behind the name
            suffix = suffix + table[:, places]
        return self.tower.encode_shared(prefix, suffix, self.at - p, chunk)

    def features_by_class(self, context: Tensor, chunk: int = CHUNK) -> Tensor:
        """Features of every class from a context of its own: (c, m, d) -> (1, c, e)."""
        table = torch.cat([torch.zeros_like(context[:, :1]), context], dim=1)
        rows = self.frozen + table[torch.arange(len(table), device=table.device)[:, None], self.slots]
        if not self.tower.shares or not self.start:
            return self._whole(rows[None], chunk)
        p = self.start
        return self.tower.encode_shared(rows[:1, :p], rows[:, p:], self.at - p, chunk)

    def _whole(self, rows: Tensor, chunk: int) -> Tensor:
        """Every row from its first token on, for towers that see all of it: (g, c, n, d) -> (g, c, e)."""
        groups, classes, tokens, _ = rows.shape
        flat, at = rows.flatten(0, 1), self.at.repeat(groups)
        step = max(1, chunk // tokens)
        run = self.tower.encode
        if step < len(flat) and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False)
        parts = [run(part, places) for part, places in zip(flat.split(step), at.split(step), strict=True)]
        return torch.cat(parts).view(groups, classes, -1)


def _layout(words: Words, name: str, length: int, position: str) -> list[int]:
    """A row's ids between the marks; context vector k is -(k + 1)."""
    body, own = words.content(f"{name}."), words.content(name)
    stop = body[len(own) :] if body[: len(own)] == own else []
    own = body[: len(body) - len(stop)]
    context = [-(k + 1) for k in range(length)]
    half = {"end": length, "middle": length // 2, "front": 0}[position]
    return [*context[:half], *own, *context[half:], *stop]
