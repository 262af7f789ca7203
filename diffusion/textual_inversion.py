r"""Textual Inversion: teach a frozen text-to-image model a new word from a few pictures.

A placeholder token gets `vectors` new rows v in the text encoder's embedding table; they are all that is trained
(Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion", 2022,
arXiv:2208.01618):

    v* = argmin_v E_{x, n, t} || target(x, n, t) - denoiser(x_t, t, text(prompt, v)) ||^2

with prompts such as "a photo of <concept>". Differences from the authors' code: the new rows live outside the table
(gathered from the frozen table, then put in at placeholder positions: the same mathematics, but no gradient, optimiser
state or copy of the table); several vectors start as noisy copies, so that they are not symmetric; the initialiser may
be a phrase, whose tokens are dealt out in turn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.diffusion.data import TEMPLATES
from graft.diffusion.method import DiffusionMethod, Encode, Work
from graft.studio.config import from_dict, require
from graft.studio.errors import FormatError, InputError, SiteError
from graft.studio.formats.files import write_tensors

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter


@dataclass(frozen=True)
class TextualInversion(DiffusionMethod):
    """Hyper-parameters of Textual Inversion; `attach` acts on a loaded base.

    Example:
        >>> handle = TextualInversion(token="<sprout>", vectors=2).attach(base)  # doctest: +SKIP
        >>> handle.detach()  # doctest: +SKIP
    """

    token: str = "<concept>"
    """The new word, in lower case, without spaces. Put it into prompts."""
    vectors: int = 2
    """Rows learnt for it: more capture more detail and are harder to combine with other words."""
    initializer: str | None = None
    """Words whose rows the vectors start from, dealt out in turn; None draws random rows of the table's spread."""
    jitter: float = 0.1
    """Noise on repeated starts, in standard deviations of the table."""
    templates: Literal["object", "style"] = "object"
    """Prompts for pictures without a caption."""
    keep_norm: bool = False
    """Holds every vector at the table's median length, which keeps the word easier to combine."""
    snr_gamma: float | None = None
    """Min-SNR's gamma (the paper's is 5); None weights all noise levels equally."""

    own = frozenset({"token", "initializer", "jitter", "vectors", "templates"})
    default_learning_rate = 5e-3

    def __post_init__(self) -> None:
        plain = self.token.strip() and not any(c.isspace() for c in self.token) and self.token == self.token.lower()
        require("method.token", self.token, bool(plain), "one lower-case word such as <concept>")
        require("method.vectors", self.vectors, 1 <= self.vectors <= 32, "1 to 32")
        require("method.jitter", self.jitter, 0 <= self.jitter <= 10, "0 to 10")
        require("method.templates", self.templates, self.templates in TEMPLATES, " or ".join(TEMPLATES))
        gamma = self.snr_gamma
        require("method.snr_gamma", gamma, gamma is None or gamma > 0, "a number above 0")

    @property
    def trigger(self) -> str:  # type: ignore[override]
        """The word that calls the concept."""
        return self.token

    def prompts(self, caption: str | None) -> list[str]:
        """Training prompts of a picture: its own caption, or the templates.

        Raises:
            InputError: a caption without the placeholder, which would teach the word nothing.
        """
        if caption is None:
            return [template.format(self.token) for template in TEMPLATES[self.templates]]
        caption = caption.replace("{token}", self.token)
        if self.token not in caption:
            raise InputError(
                f"caption {caption!r}", f"it does not contain {self.token}", "Write the placeholder into every caption"
            )
        return [caption]

    @classmethod
    def attach_jobs(cls, work: Work) -> tuple[Concepts, Encode]:
        """Attaches a word for each job; the text encoder runs at every step, on the few prompts that occur."""
        methods = [subject.method for subject in work.subjects]
        # Jobs may have chosen the same word: in a shared batch each gets one of its own.
        inner = methods if len(methods) == 1 else [replace(m, token=f"<graft-{i}>") for i, m in enumerate(methods)]
        handle = attach_concepts(work.base, inner, [subject.job.train.seed for subject in work.subjects])
        ids = work.base.tokenize(
            [text.replace(methods[slot].token, inner[slot].token) for slot, text in work.table.entries]
        )
        known = len(work.base.tokenizer) - sum(method.vectors for method in methods)
        for (_, text), row in zip(work.table.entries, ids, strict=True):
            if not bool((row >= known).any()):
                handle.detach()
                reason = f"it is cut off after {ids.shape[1]} tokens, before the word to learn"
                raise InputError(f"caption {text!r}", reason, "Shorten it, or put the word first")
        return handle, lambda rows: work.base.condition(ids[rows])

    def attach(self, base: Any, seed: int = 0) -> Concepts:
        """Adds this word to a base. See `attach_concepts`."""
        return attach_concepts(base, [self], [seed])

    @classmethod
    def attach_to(cls, base: Any, tensors: dict[str, Tensor], card: Any) -> Concepts:
        """Puts a trained word back; `card.config` holds its hyper-parameters."""
        handle = attach_concepts(base, [from_dict(cls, card.config, "adapter.json")], [0])
        try:
            handle.load(tensors)
        except FormatError:
            handle.detach()
            raise
        return handle

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes `learned_embeds.safetensors`, {token: (n, d)}, for `pipe.load_textual_inversion`.

        AUTOMATIC1111 and ComfyUI read the same file.
        """
        if format != "diffusers":
            raise InputError(f"format {format!r}", "Textual Inversion is not written in it", "use native or diffusers")
        rows = adapter.tensors["embedding"].float()
        file = Path(folder) / "learned_embeds.safetensors"
        return [write_tensors(file, {adapter.card.config["token"]: rows}, {"format": "pt"})]


class ConceptRows(nn.Module):
    """The trainable rows of several words: `rows[slot]` is (n, d) float32."""

    def __init__(self, starts: Iterable[Tensor], norms: Sequence[float | None]):
        super().__init__()
        self.rows = nn.ParameterList([nn.Parameter(start.float()) for start in starts])
        self.norms = norms

    def vectors(self, slot: int) -> Tensor:
        """Rows as the text encoder sees them, at the kept norm if one is kept: (n, d)."""
        rows, norm = self.rows[slot], self.norms[slot]
        return rows if norm is None else F.normalize(rows, dim=-1) * norm

    def forward(self) -> Tensor:
        """All words' rows, one under the other."""
        return torch.cat([self.vectors(slot) for slot in range(len(self.rows))])


class ConceptEmbedding(nn.Embedding):
    """An embedding table with rows beyond its end; entered by class swap, so keys and types of the base stay."""

    def forward(self, ids: Tensor) -> Tensor:
        """(b, n) ids -> (b, n, d); ids from `first` on are looked up in the words' rows."""
        first, banks = self.__dict__["concepts"]
        new = ids >= first
        known = F.embedding(ids.masked_fill(new, 0), self.weight)
        rows = torch.cat([bank() for bank in banks]).to(known.dtype)
        learnt = F.embedding((ids - first).clamp(0, len(rows) - 1), rows)
        return torch.where(new[..., None], learnt, known)


class Concepts:
    """Words attached to a base: `bank` holds what is trained; `detach` restores tokenizer and table."""

    def __init__(self, base: Any, methods: Sequence[TextualInversion], bank: ConceptRows, tokenizer: Any):
        self.base, self.methods, self.bank = base, methods, bank
        self._former = base.pipe.tokenizer
        self._former_weight: nn.Parameter | None = None
        self._table = base.pipe.text_encoder.get_input_embeddings()
        state = self._table.__dict__.setdefault("concepts", (len(self._former), []))
        self._table.__class__ = ConceptEmbedding
        state[1].append(bank)
        base.pipe.tokenizer = self._own = tokenizer

    def owned(self) -> list[tuple[nn.Parameter, int | None]]:
        """Each word is a parameter of its own."""
        return [(row, slot) for slot, row in enumerate(self.bank.rows)]

    def tensors(self, slot: int = 0) -> dict[str, Tensor]:
        """What a trained adapter keeps: `embedding` (n, d)."""
        return {"embedding": self.bank.vectors(slot).detach().cpu().clone()}

    def load(self, tensors: dict[str, Tensor], slot: int = 0) -> None:
        """Sets a word's rows.

        Raises:
            FormatError: another shape than this base and `vectors` need.
        """
        rows, found = self.bank.rows[slot], tensors.get("embedding")
        if found is None or found.shape != rows.shape:
            got = "nothing" if found is None else tuple(found.shape)
            raise FormatError("embedding", f"expected {tuple(rows.shape)}, got {got}", "Use the base it was trained on")
        with torch.no_grad():
            rows.copy_(found)

    def probe(self, run: Callable[[], Tensor]) -> None:
        """One forward and backward: every word must get a gradient.

        Raises:
            SiteError: naming the words that no prompt of `run` contains or that the denoiser does not hear.
        """
        grads = torch.autograd.grad(run().sum(), list(self.bank.parameters()), allow_unused=True)
        dead = [m.token for m, g in zip(self.methods, grads, strict=True) if g is None or not g.abs().sum() > 0]
        if dead:
            raise SiteError(", ".join(dead), "no gradient reaches the new rows", "Check the prompts and the base")

    @torch.no_grad()
    def merge(self, slot: int = 0) -> None:
        """Makes the rows part of the table itself, so that the base can be saved with its words; `detach` restores it.

        Raises:
            InputError: other words are attached too.
        """
        first, banks = self._table.__dict__["concepts"]
        if banks != [self.bank]:
            raise InputError(self.methods[0].token, "other words are attached too", "Detach them first")
        self._former_weight, rows = self._table.weight, self.bank().to(self._table.weight)
        # A table may be longer than its tokenizer; ids of new words go on where the tokenizer's end.
        grown = torch.cat([self._former_weight[:first], rows, self._former_weight[first + len(rows) :]])
        self._set_table(nn.Parameter(grown, requires_grad=False))

    def _set_table(self, weight: nn.Parameter) -> None:
        self._table.weight, self._table.num_embeddings = weight, len(weight)
        self.base.pipe.text_encoder.config.vocab_size = len(weight)

    def detach(self) -> None:
        """Restores the base bit for bit. Words attached later must be detached first."""
        if self.base.pipe.tokenizer is not self._own:
            raise InputError(self.methods[0].token, "another word was attached after it", "Detach that one first")
        if self._former_weight is not None:
            self._set_table(self._former_weight)
        _, banks = self._table.__dict__["concepts"]
        banks.remove(self.bank)
        if not banks:
            del self._table.__dict__["concepts"]
            self._table.__class__ = nn.Embedding
        self.base.pipe.tokenizer = self._former


def attach_concepts(base: Any, methods: Sequence[TextualInversion], seeds: Sequence[int]) -> Concepts:
    """Adds several words to one base; a row of a batch picks its word by the ids of its prompt.

    Args:
        base: a `DiffusionBase` with one text encoder.
        methods: one word each.
        seeds: of the random starts.

    Raises:
        InputError: a word that the tokenizer knows already or cannot keep whole, or a second text encoder.
    """
    if "unet" not in base.modules:
        raise InputError(base.name, "Textual Inversion needs CLIP's words in every layer", "Use method lora")
    if getattr(base.pipe, "text_encoder_2", None) is not None:
        raise InputError(base.name, "a new word is learnt in one text encoder, it has two", "Use method lora")
    table = base.pipe.text_encoder.get_input_embeddings()
    if type(table) not in (nn.Embedding, ConceptEmbedding):
        raise SiteError("text_encoder", f"its table is a {type(table).__name__}", "Detach what is attached there")
    tokenizer = _with_words(base.tokenizer, [method.token for method in methods], [m.vectors for m in methods])
    weight = table.weight.detach().float()
    median = float(weight.norm(dim=-1).median())
    starts = [_start(m, base.tokenizer, weight, seed) for m, seed in zip(methods, seeds, strict=True)]
    bank = ConceptRows(starts, [median if m.keep_norm else None for m in methods]).to(table.weight.device)
    return Concepts(base, methods, bank, tokenizer)


def _with_words(tokenizer: Any, tokens: list[str], counts: list[int]) -> Any:
    """A copy of the tokenizer with `<tok>`, `<tok>_1`, ... as diffusers expects them."""
    grown = copy.deepcopy(tokenizer)
    for token, count in zip(tokens, counts, strict=True):
        words = [token, *(f"{token}_{i}" for i in range(1, count))]
        if set(words) & grown.get_vocab().keys() or grown.add_tokens(words) != count:
            raise InputError(f"method.token = {token!r}", "the tokenizer has this word already", "Choose another word")
        if grown.tokenize(f"a {token} b").count(token) != 1:
            raise InputError(f"method.token = {token!r}", "the tokenizer breaks it up", "Choose a word like <concept>")
    return grown


def _start(method: TextualInversion, tokenizer: Any, weight: Tensor, seed: int) -> Tensor:
    """First values of the rows: (n, d)."""
    generator = torch.Generator().manual_seed(seed)
    spread = weight.std().cpu()
    noise = torch.randn(method.vectors, weight.shape[1], generator=generator) * spread
    if not method.initializer:
        return noise
    ids = tokenizer(method.initializer, add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids:
        reason = "the tokenizer has no tokens for these words"
        raise InputError(f"method.initializer = {method.initializer!r}", reason, "Use other words, or leave it out")
    rows = weight[[ids[i % len(ids)] for i in range(method.vectors)]].cpu()
    repeated = torch.arange(method.vectors)[:, None] >= len(ids)
    return rows + noise * method.jitter * repeated
