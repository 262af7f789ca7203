r"""Textual Inversion: teach a frozen text-to-image model a new word from a few pictures.

A placeholder token gets `vectors` new rows v in the text encoder's embedding table; they are all that is trained
(Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion", 2022,
arXiv:2208.01618):

    v* = argmin_v E_{x, n, t} || target(x, n, t) - denoiser(x_t, t, text(prompt, v)) ||^2

with prompts such as "a photo of <concept>". In Stable Diffusion XL the word has rows in the tables of both text
encoders. Differences from the authors' code: the new rows live outside the table (gathered from the frozen table, then
put in at placeholder positions: the same mathematics, but no gradient, optimiser state or copy of the table); several
vectors start as noisy copies, so that they are not symmetric; the initialiser may be a phrase, whose tokens are dealt
out in turn.

The second text encoder of the published XL bases names a wrong end of text in its config (2), for which transformers
takes the pooled output at the largest id of the prompt: with a new word, at the word. Rows are learnt like that, as
diffusers will use them.
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
from graft.studio.formats import provenance

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter

ENCODERS = {"embedding": ("text_encoder", "tokenizer"), "embedding_2": ("text_encoder_2", "tokenizer_2")}
"""Name of a word's rows -> the pipeline's text encoder and tokenizer that they are for."""


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
        for (_, text), row in zip(work.table.entries, ids, strict=True):
            if not handle.in_prompt(row):
                handle.detach()
                reason = f"it is cut off after {ids.shape[-1]} tokens, before the word to learn"
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
        """Writes the word for another program.

        `diffusers` is a file for each text encoder, for `pipe.load_textual_inversion`; where there is one, A1111 and
        ComfyUI read it too. `kohya` is one file for all text encoders, which those two read in any case.
        """
        from graft.studio.formats.textual_inversion import write_apart, write_together

        told, header = (Path(folder), adapter.card.config["token"], adapter.tensors), provenance.header(adapter.card)
        if format == "diffusers":
            return write_apart(*told, header)
        if format == "kohya":
            return [write_together(*told, header)]
        remedy = "use native, diffusers or kohya"
        raise InputError(f"format {format!r}", "Textual Inversion is not written in it", remedy)


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


class WordTable:
    """Words in one text encoder: its table finds the rows of a bank behind its own, its tokenizer knows the words."""

    def __init__(self, pipe: Any, names: tuple[str, str], bank: ConceptRows, tokenizer: Any):
        self.pipe, self.names, self.bank = pipe, names, bank
        self.former, self.own = getattr(pipe, names[1]), tokenizer
        self._former_weight: nn.Parameter | None = None
        self._table = getattr(pipe, names[0]).get_input_embeddings()
        self.first, banks = self._table.__dict__.setdefault("concepts", (len(self.former), []))
        self._table.__class__ = ConceptEmbedding
        self.known = len(self.former)
        banks.append(bank)
        setattr(pipe, names[1], tokenizer)

    @property
    def alone(self) -> bool:
        """Whether no other words are attached to the table."""
        return self._table.__dict__["concepts"][1] == [self.bank]

    @property
    def latest(self) -> bool:
        """Whether no other words were attached after these."""
        return getattr(self.pipe, self.names[1]) is self.own

    @torch.no_grad()
    def merge(self) -> None:
        """Makes the rows part of the table itself."""
        self._former_weight, rows = self._table.weight, self.bank().to(self._table.weight)
        # A table may be longer than its tokenizer; ids of new words go on where the tokenizer's end.
        grown = torch.cat([self._former_weight[: self.first], rows, self._former_weight[self.first + len(rows) :]])
        self._set(nn.Parameter(grown, requires_grad=False))

    def _set(self, weight: nn.Parameter) -> None:
        self._table.weight, self._table.num_embeddings = weight, len(weight)
        getattr(self.pipe, self.names[0]).config.vocab_size = len(weight)

    def detach(self) -> None:
        """Gives the table and the tokenizer back as they were."""
        if self._former_weight is not None:
            self._set(self._former_weight)
        _, banks = self._table.__dict__["concepts"]
        banks.remove(self.bank)
        if not banks:
            del self._table.__dict__["concepts"]
            self._table.__class__ = nn.Embedding
        setattr(self.pipe, self.names[1], self.former)


class Concepts:
    """Words attached to a base, in each of its text encoders; `bank` holds what is trained; `detach` takes them out."""

    def __init__(self, base: Any, methods: Sequence[TextualInversion], tables: dict[str, WordTable]):
        self.base, self.methods, self.tables = base, methods, tables
        banks = {name: table.bank for name, table in tables.items()}
        self.bank: Any = nn.ModuleDict(banks) if len(banks) > 1 else banks["embedding"]

    def owned(self) -> list[tuple[nn.Parameter, int | None]]:
        """Each word is a parameter of its own in each text encoder."""
        return [(row, slot) for table in self.tables.values() for slot, row in enumerate(table.bank.rows)]

    def in_prompt(self, ids: Tensor) -> bool:
        """Whether every text encoder hears one of the words in a prompt's ids, (n,) or (encoders, n)."""
        rows = ids.reshape(-1, ids.shape[-1])
        return all(bool((row >= table.known).any()) for row, table in zip(rows, self.tables.values(), strict=True))

    def tensors(self, slot: int = 0) -> dict[str, Tensor]:
        """What a trained adapter keeps: `embedding` (n, d) and, of a second text encoder, `embedding_2`."""
        return {name: table.bank.vectors(slot).detach().cpu().clone() for name, table in self.tables.items()}

    def load(self, tensors: dict[str, Tensor], slot: int = 0) -> None:
        """Sets a word's rows.

        Raises:
            FormatError: another shape than this base and `vectors` need, or rows for more or fewer text encoders.
        """
        if other := set(tensors) - set(self.tables):
            reason = f"{self.base.name} has {len(self.tables)} text encoder, the word was learnt in two"
            raise FormatError(min(other), reason, "Use the base it was trained on")
        for name, table in self.tables.items():
            rows, found = table.bank.rows[slot], tensors.get(name)
            if found is None or found.shape != rows.shape:
                got = "nothing" if found is None else tuple(found.shape)
                raise FormatError(name, f"expected {tuple(rows.shape)}, got {got}", "Use the base it was trained on")
        with torch.no_grad():
            for name, table in self.tables.items():
                table.bank.rows[slot].copy_(tensors[name])

    def probe(self, run: Callable[[], Tensor]) -> None:
        """One forward and backward: every word must get a gradient in every text encoder.

        Raises:
            SiteError: naming the words that no prompt of `run` contains or that the denoiser does not hear.
        """
        owned = self.owned()
        grads = torch.autograd.grad(run().sum(), [row for row, _ in owned], allow_unused=True)
        slots = {slot for (_, slot), g in zip(owned, grads, strict=True) if g is None or not g.abs().sum() > 0}
        if dead := [method.token for slot, method in enumerate(self.methods) if slot in slots]:
            raise SiteError(", ".join(dead), "no gradient reaches the new rows", "Check the prompts and the base")

    def merge(self, slot: int = 0) -> None:
        """Makes the rows part of the tables themselves, so that the base can be saved with its words; `detach` restores
        it.

        Raises:
            InputError: other words are attached too.
        """
        if not all(table.alone for table in self.tables.values()):
            raise InputError(self.methods[0].token, "other words are attached too", "Detach them first")
        for table in self.tables.values():
            table.merge()

    def detach(self) -> None:
        """Restores the base bit for bit. Words attached later must be detached first."""
        if not all(table.latest for table in self.tables.values()):
            raise InputError(self.methods[0].token, "another word was attached after it", "Detach that one first")
        for table in self.tables.values():
            table.detach()


def attach_concepts(base: Any, methods: Sequence[TextualInversion], seeds: Sequence[int]) -> Concepts:
    """Adds several words to one base; a row of a batch picks its word by the ids of its prompt.

    Args:
        base: a `DiffusionBase` with a UNet and one or two text encoders.
        methods: one per word, in slot order.
        seeds: of the random starts.

    Raises:
        InputError: a word that a tokenizer knows already or cannot keep whole, or another denoiser than a UNet.
    """
    if "unet" not in base.modules:
        raise InputError(base.name, "Textual Inversion needs CLIP's words in every layer", "Use method lora")
    grown, banks = {}, {}
    parts = {name: names for name, names in ENCODERS.items() if getattr(base.pipe, names[0], None) is not None}
    for name, (encoder, words) in parts.items():
        table, known = getattr(base.pipe, encoder).get_input_embeddings(), getattr(base.pipe, words)
        if type(table) not in (nn.Embedding, ConceptEmbedding):
            raise SiteError(encoder, f"its table is a {type(table).__name__}", "Detach what is attached there")
        grown[name] = _with_words(known, [method.token for method in methods], [m.vectors for m in methods])
        weight = table.weight.detach().float()
        median = float(weight.norm(dim=-1).median())
        starts = [_start(m, known, weight, seed) for m, seed in zip(methods, seeds, strict=True)]
        banks[name] = ConceptRows(starts, [median if m.keep_norm else None for m in methods]).to(table.weight.device)
    tables = {name: WordTable(base.pipe, names, banks[name], grown[name]) for name, names in parts.items()}
    return Concepts(base, methods, tables)


def load_words(pipe: Any, path: str | Path, token: str | None = None) -> str:
    """Loads a word into a stock pipeline of diffusers, which by itself reads no file for two text encoders.

    Args:
        pipe: `StableDiffusionPipeline`, `StableDiffusionXLPipeline` or another with their text encoders.
        path: any file or folder of Textual Inversion that `load_adapter` reads.
        token: what to call it, instead of its own word.

    Returns:
        The word, for prompts.

    Raises:
        InputError: a file of something else, or of a word for other text encoders.
    """
    from graft.studio.adapter import load_adapter

    adapter = load_adapter(path)
    if adapter.card.method != "textual_inversion":
        raise InputError(
            str(path), f"an adapter of {adapter.card.method}, not a word", "Give a file of Textual Inversion"
        )
    parts = {name: names for name, names in ENCODERS.items() if getattr(pipe, names[0], None) is not None}
    widths = {name: getattr(pipe, names[0]).get_input_embeddings().weight.shape[1] for name, names in parts.items()}
    if widths != (own := {name: rows.shape[1] for name, rows in adapter.tensors.items()}):
        given = f"rows of width {' and '.join(map(str, own.values()))}"
        reason = f"the pipeline's text encoders have {' and '.join(map(str, widths.values()))}"
        raise InputError(str(path), f"{given}; {reason}", "Use the base it was trained on")
    token = token or str(adapter.card.config["token"])
    for name, (encoder, tokenizer) in parts.items():
        told = {"text_encoder": getattr(pipe, encoder), "tokenizer": getattr(pipe, tokenizer)}
        pipe.load_textual_inversion(adapter.tensors[name], token=token, **told)
    return token


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
