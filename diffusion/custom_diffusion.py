r"""Custom Diffusion: one or several concepts learnt as new words and new keys and values of the cross-attention.

Nupur Kumari, Bingliang Zhang, Richard Zhang, Eli Shechtman, Jun-Yan Zhu: Multi-Concept Customization of Text-to-Image
Diffusion, 2022, arXiv:2212.04488. What maps the text into the denoiser is trained in full, together with the row v of a
modifier word that stands before the noun ("a photo of <new1> cat"):

    min over v, W_K, W_V of  E || target(x) - denoiser(x_t, t, text(prompt, v)) ||^2
                             + prior_weight * E || target(x') - denoiser(x'_t, t, text(class_prompt)) ||^2

x are pictures of the concepts, x' those of their classes: the base's own drawings, or a folder (`class_path`; the
authors recommend real pictures). Keys and values of the first token, which begins every text, get no gradient. All
concepts of a job are learnt from mixed batches (the paper's joint training); separately trained ones are joined by
`graft.diffusion.concept_merge`.

Differs from the authors' code: what is kept and trained is the change of W_K and W_V, stacked over slots, so that rows
of one batch may belong to different adapters (for Adam the same steps as on the weights themselves); no weight decay;
the row lives outside the token table. With `freeze_model = "crossattn"` query and output are trained too, as by the
authors' option of this name; paper and default train keys and values alone. Their random rescaling (`augment`) is
prepared as `data.variants` of each picture, two in three of them pasted small on a grey canvas, whose latents count
nothing in the loss, the third zoomed in; captions say "a far away", "a very small", "a zoomed in" or "a close up"
before the words of the prompt. Their recipe for Stable Diffusion 1.x: learning rate 8e-5 (1e-5 for each of 4 + 4 rows
of a batch), 250 steps, 500 for two concepts, 200 class pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.diffusion.data import TEMPLATES, Picture
from graft.diffusion.lora import class_folder, class_latents
from graft.diffusion.method import DiffusionMethod, Encode, PromptTable, Subject, Work, latents
from graft.diffusion.task import Source, row_slots
from graft.diffusion.textual_inversion import TextualInversion, attach_concepts
from graft.diffusion.variants import reworded
from graft.diffusion.words_and_weights import WordsAndWeights
from graft.studio.caches import Cache
from graft.studio.config import from_dict, require
from graft.studio.errors import DataError, InputError
from graft.studio.methods.bitfit import BiasSlot
from graft.studio.sites import Model, Plan, Site, named_modules, plan_biases, plan_sites
from graft.studio.slot import Base, Slot
from graft.studio.slots import attach

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase
    from graft.studio.adapter import Adapter, Card

RARE = ("ktn", "pll", "ucd")
"""Tokens of CLIP that hardly occur; new words start from them."""


@dataclass(frozen=True)
class CustomDiffusion(DiffusionMethod):
    """Hyper-parameters of Custom Diffusion; `attach` acts on a loaded base.

    Example:
        >>> handle = CustomDiffusion(token="<new1>", class_word="cat").attach(base)  # doctest: +SKIP
        >>> handle.detach()  # doctest: +SKIP
    """

    token: str | tuple[str, ...] = "<new1>"
    """The new word. Several learn several concepts at once, each from a folder of its own in data.path."""
    folders: tuple[str, ...] = ()
    """Those folders, in the order of the words; empty takes all that hold pictures, in the order of their names."""
    class_word: str | tuple[str, ...] = ""
    """What each concept is an example of, such as "cat": prompts say "<new1> cat"."""
    initializer: str | tuple[str, ...] | None = None
    """Words that the new ones start from; None takes the rare tokens ktn, pll and ucd where the tokenizer has them
    whole, else random rows of the table's spread."""
    vectors: int = 1
    """Rows learnt for each word."""
    class_prompt: str | tuple[str, ...] | None = None
    """What each class is drawn from, such as "a photo of a cat"; turns prior preservation on."""
    class_path: str | None = None
    """Folder of class pictures with captions (class_prompt where one has none), instead of the base's drawings."""
    class_pictures: int = 16
    """How many pictures of each class the base draws; the authors take 200."""
    prior_weight: float = 1.0
    """Weight of the classes' loss beside the concepts'."""
    word_rate: float = 1.0
    """Learning rate of the words over that of keys and values."""
    augment: bool = False
    """Show the concepts smaller and larger than they are, and say so in the prompts, as the authors do; takes
    data.variants, say 12."""
    freeze_model: str = "crossattn_kv"
    """What is trained beside the words: crossattn_kv, keys and values of the text; crossattn, queries and outputs of
    the cross-attention too."""
    snr_gamma: float | None = None
    """Min-SNR's gamma (the paper's is 5); None weights all noise levels equally."""

    own = frozenset({"token", "folders", "class_word", "initializer", "vectors"}) | frozenset(
        {"class_prompt", "class_path", "class_pictures", "prior_weight"}
    )
    default_learning_rate = 1e-3

    def __post_init__(self) -> None:
        require("method.token", self.token, 0 < len(set(self.tokens)) == len(self.tokens), "different words")
        for token in self.tokens:
            TextualInversion(token=token, vectors=self.vectors)
        for name in ("folders", "class_word", "initializer", "class_prompt"):
            given = getattr(self, name)
            fits = isinstance(given, str | None) or len(given) in (0, len(self.tokens))
            require(f"method.{name}", given, fits, f"one for each of {len(self.tokens)} words")
        require("method.class_pictures", self.class_pictures, 1 <= self.class_pictures <= 10_000, "1 to 10,000")
        require("method.prior_weight", self.prior_weight, self.prior_weight >= 0, "0 or more")
        require("method.word_rate", self.word_rate, self.word_rate >= 0, "0 or more")
        kinds = ("crossattn_kv", "crossattn")
        require("method.freeze_model", self.freeze_model, self.freeze_model in kinds, "crossattn_kv or crossattn")
        gamma = self.snr_gamma
        require("method.snr_gamma", gamma, gamma is None or gamma > 0, "a number above 0")

    @property
    def tokens(self) -> tuple[str, ...]:
        """The new words."""
        return (self.token,) if isinstance(self.token, str) else self.token

    @property
    def rescales(self) -> bool:
        """Whether the variants of a picture are shown smaller and larger."""
        return self.augment

    @property
    def phrases(self) -> tuple[str, ...]:
        """What calls each concept: its word, and what it is."""
        return tuple(f"{a} {b}".strip() for a, b in zip(self.tokens, self.of_each(self.class_word, ""), strict=True))

    @property
    def trigger(self) -> str:  # type: ignore[override]
        """What calls all concepts."""
        return " and ".join(self.phrases)

    def of_each(self, given: str | tuple[str, ...] | None, default: Any = None) -> tuple[Any, ...]:
        """A setting for each of the words."""
        return given or (default,) * len(self.tokens) if isinstance(given, tuple) else (given,) * len(self.tokens)

    def prompts(self, caption: str | None, concept: int | None = None) -> list[str]:
        """Training prompts of a picture of a concept; without one, of the only concept, or one prompt for each.

        Raises:
            InputError: a caption without the new word, which would teach it nothing.
        """
        if concept is None and len(self.tokens) > 1:
            return [f"a photo of {phrase}" for phrase in self.phrases]
        token, phrase = self.tokens[concept or 0], self.phrases[concept or 0]
        if caption is None:
            return [template.format(phrase) for template in TEMPLATES["object"]]
        caption = caption.replace("{token}", phrase)
        if token not in caption:
            reason = f"it does not contain {token}"
            raise InputError(f"caption {caption!r}", reason, "Write {token} into every caption")
        return [caption]

    def concept_of(self, pictures: Sequence[Picture], root: str) -> list[int]:
        """The concept that each picture shows, told by its folder.

        Raises:
            DataError: there is not one folder for each word.
        """
        if len(self.tokens) == 1:
            return [0] * len(pictures)
        places = [picture.path.relative_to(root).parts for picture in pictures]
        found = sorted({parts[0] for parts in places if len(parts) > 1})
        folders = list(self.folders) or found
        if len(folders) != len(self.tokens) or set(folders) - set(found):
            held, wanted = ", ".join(found) or "none", ", ".join(self.tokens)
            raise DataError(root, f"folders with pictures: {held}", f"Make one for each of {wanted}, or set folders")
        if loose := [parts[0] for parts in places if parts[0] not in folders]:
            raise DataError(root, f"{loose[0]} belongs to none of {', '.join(folders)}", "Move it into one of them")
        return [folders.index(parts[0]) for parts in places]

    def sources(
        self, base: DiffusionBase, subject: Subject, slot: int, table: PromptTable, cache: Cache
    ) -> Iterator[Source]:
        """Yields the pictures of all concepts and, for prior preservation, those of their classes."""
        dataset, everything, rows = subject.dataset, subject.pictures, subject.job.train.batch_size
        concepts = dict(zip(map(id, everything), self.concept_of(everything, subject.data.path), strict=True))
        told = [self.prompts(each.caption, concepts[id(each)]) for each in dataset.pictures]
        posterior = latents(base, dataset, cache)
        wording = None
        if dataset.wording is not None:
            wording = [
                [table.rows(slot, [reworded(prompt, frame) for prompt in some]) for frame in frames]
                for some, frames in zip(told, dataset.wording, strict=True)
            ]
        prompts = [table.rows(slot, some) for some in told]
        yield Source(posterior["mean"], posterior["std"], prompts, rows, slot=slot, wording=wording)
        classes = list(dict.fromkeys(prompt for prompt in self.of_each(self.class_prompt) if prompt))
        digest = ""
        if self.class_path is not None:
            mean, std, shown, digest = class_folder(base, self.class_path, classes, dataset.shape, cache)
        elif classes:
            count = subject.share(self.class_pictures)
            drawn = [class_latents(base, prompt, count, dataset.shape, cache) for prompt in classes]
            mean, std = (torch.cat([each[name] for each in drawn])[:, None] for name in ("mean", "std"))
            shown = [prompt for prompt in classes for _ in range(count)]
        else:
            return
        prompts = [table.rows(slot, [prompt]) for prompt in shown]
        yield Source(mean, std, prompts, rows, self.prior_weight, slot, digest=digest)

    @classmethod
    def attach_jobs(cls, work: Work) -> tuple[WordsAndWeights, Encode]:
        """Attaches words and changes for each job; the text encoder runs at every step, on the prompts that occur."""
        base, methods = work.base, [subject.method for subject in work.subjects]
        handle = attach_custom(base, methods, [subject.job.train.seed for subject in work.subjects])
        handle.route(row_slots(work.sources) if len(methods) > 1 else None)
        ids = base.tokenize([handle.spoken(slot, text) for slot, text in work.table.entries])
        for (slot, text), row in zip(work.table.entries, ids, strict=True):
            if any(token in text for token in methods[slot].tokens) and not handle.words.in_prompt(row):
                handle.detach()
                reason = f"it is cut off after {ids.shape[-1]} tokens, before the word to learn"
                raise InputError(f"caption {text!r}", reason, "Shorten it, or put the word first")
        return handle, lambda rows: base.condition(ids[rows])

    def attach(self, base: DiffusionBase, seed: int = 0) -> WordsAndWeights:
        """Adds the concepts to a base, whose pictures are as before until they are trained."""
        return attach_custom(base, [self], [seed])

    @classmethod
    def attach_to(cls, base: DiffusionBase, tensors: Mapping[str, Tensor], card: Card) -> WordsAndWeights:
        """Attaches trained concepts; whole weights, as other programs' files hold them, become changes of the base's.

        Raises:
            FormatError: tensors that do not fit.
            SiteError: a base without these layers.
        """
        method = from_dict(cls, card.config, "adapter.json")
        vectors = [len(tensors.get(f"embedding.{token}", [0])) for token in method.tokens]
        return attach_custom(base, [method], [0], vectors).restored(tensors)

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes the concepts for others. See `graft.diffusion.custom_diffusion_files`."""
        from graft.diffusion.custom_diffusion_files import export

        return export(adapter, Path(folder), format)

    @classmethod
    def combine(cls, adapters: Sequence[Adapter], base: DiffusionBase, captions: Sequence[str] = ()) -> Adapter:
        """Joins separately trained concepts. See `graft.diffusion.concept_merge.merge_concepts`."""
        from graft.diffusion.concept_merge import CAPTIONS, merge_concepts

        return merge_concepts(base, adapters, captions or CAPTIONS)


class DenseSlot(Slot):
    """The full change of a linear layer: (slots, out, in), zero at first.

    Row-wise y = x W' + s x D'; of the first token's keys and values nothing is learnt.
    """

    def __init__(self, site: Site, slots: int):
        super().__init__(site, slots)
        self.change = nn.Parameter(torch.zeros(slots, *site.covered))

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Clears the change."""
        self.change[slot].zero_()

    def delta(self, slot: int) -> Tensor:
        """Returns s D."""
        return self.scale[slot] * self.change[slot]

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns y (b, n, o) with the change for x (b, n, i)."""
        change, scale = self.pick(self.change)
        change = (scale.view(-1, 1, 1) * change).to(x.dtype)
        y = y + (F.linear(x, change[0]) if len(change) == 1 else x @ change.mT).to(y.dtype)
        # The same for every text: were it trained, each picture of the base would change with it.
        fixed = y.requires_grad and self.site.role in ("k", "v")
        return torch.cat([y[:, :1].detach(), y[:, 1:]], 1) if fixed else y


def text_layers(model: Model, freeze_model: str = "crossattn_kv") -> Plan:
    """The layers that make keys and values of the text: 32 in Stable Diffusion 1.x, with 19.17 M parameters.

    Args:
        model: a denoiser, or the parts of a base.
        freeze_model: `crossattn` adds those of queries and outputs, and the outputs' biases: 43.96 M.

    Raises:
        SiteError: a denoiser without cross-attention.
    """
    modules = {"unet": model} if isinstance(model, nn.Module) else {"unet": model["unet"]}
    whole = freeze_model == "crossattn"
    sites = plan_sites(modules, r"attn2\.to_([qkv]|out\.0)" if whole else r"attn2\.to_[kv]", kinds=("linear",)).sites
    if whole:
        sites += plan_biases(modules, r"attn2\.to_out\.0").sites
    return Plan(sites, tuple(prod(site.shape) for site in sites))


def attach_custom(
    base: DiffusionBase, methods: Sequence[CustomDiffusion], seeds: Sequence[int], vectors: Sequence[int] = ()
) -> WordsAndWeights:
    """Attaches the concepts of several methods, a slot each.

    Args:
        base: with a UNet and one or two text encoders.
        methods: one per slot.
        seeds: of random starts, one per slot.
        vectors: rows of each word; empty leaves it to the methods.

    Raises:
        InputError: a word that a tokenizer knows already or cannot keep whole.
        SiteError: a denoiser without cross-attention.
    """
    if "unet" not in base.modules:
        raise InputError(base.name, "its denoiser has no cross-attention to the text", "Use method lora")
    plan, words, inner = text_layers(base.modules, methods[0].freeze_model), list[TextualInversion](), list[list[str]]()
    for method in methods:
        own = _words(method, base.tokenizer)
        if len(methods) > 1:  # jobs may have chosen the same words: in a shared batch each gets its own
            own = [replace(word, token=f"<graft-{len(words) + i}>") for i, word in enumerate(own)]
        inner.append([word.token for word in own])
        words += own
    if vectors:
        words = [replace(word, vectors=count) for word, count in zip(words, vectors, strict=True)]
    starts = [seed + i for seed, some in zip(seeds, inner, strict=True) for i in range(len(some))]
    layers = named_modules(base.modules)

    def slot(site: Site) -> Slot:
        many = len(methods)
        return BiasSlot(site, many, layers[site.name]) if site.kind == "bias" else DenseSlot(site, many)

    weights = attach(base.modules, plan, slot)
    try:
        return WordsAndWeights(attach_concepts(base, words, starts), weights, methods, inner)
    except InputError:
        weights.detach()
        raise


def _words(method: CustomDiffusion, tokenizer: Any) -> list[TextualInversion]:
    """The method's words as Textual Inversion has them."""
    whole = [rare if len(tokenizer.tokenize(rare)) == 1 else None for rare in RARE]
    starts = method.of_each(method.initializer)
    return [
        TextualInversion(token=token, vectors=method.vectors, initializer=start or whole[i % len(whole)])
        for i, (token, start) in enumerate(zip(method.tokens, starts, strict=True))
    ]
