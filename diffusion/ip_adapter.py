r"""IP-Adapter: a frozen text-to-image model learns to take pictures as prompts beside text.

A frozen image encoder looks at a picture, a small projection makes tokens of what it saw, and every cross attention of
the denoiser gets keys and values of its own for them (Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for
Text-to-Image Diffusion Models", 2023, arXiv:2308.06721):

    Z = Attn(Q, K, V) + scale * Attn(Q, K', V'),   K' = tokens W_k',  V' = tokens W_v'

K, V are those of the text. Trained are the projection (`kind` "base": one linear map of CLIP's feature to 4 tokens and
a LayerNorm; "plus": a perceiver resampler of the patches to `queries` tokens) and W_k', W_v' of every cross attention,
which start as copies of its W_k, W_v. In training a row goes without its picture, without its text, or without both,
`drop` of the rows each. At scale 0 the output is the base's.

Differs from the authors' code: everything frozen is computed once, before the first step; the encoder sees the same
part of the picture as the autoencoder (its middle, where that is not square), not another crop of the file; attention
over text and picture is one fused operation; rows may differ in scale and in how many pictures they are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graft.diffusion.data import Dataset
from graft.diffusion.decoupled_attention import KeysValues, cross_attentions
from graft.diffusion.image_encoder import ImageEncoder, as_picture, image_encoder, same_encoder
from graft.diffusion.method import DiffusionMethod, Encode, PromptTable, Subject, Work, encoded
from graft.diffusion.picture_prompts import PicturePrompts
from graft.diffusion.precision import ShortAttention
from graft.diffusion.resampler import Resampler
from graft.diffusion.task import Drops, Source
from graft.studio.adapter import load_adapter
from graft.studio.caches import Cache, content_key
from graft.studio.config import from_dict, require
from graft.studio.errors import BaseMismatchError, FormatError, GraftError, InputError, SiteError
from graft.studio.formats import provenance
from graft.studio.formats.files import write_tensors
from graft.studio.formats.ip_adapter import FILE
from graft.studio.method import loaded

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase
    from graft.studio.adapter import Adapter, Card

BASE_TOKENS = 4
"""Tokens of kind "base"; readers of the files take the number for granted."""
FEWEST = 200
"""Pictures below which a training from scratch can only learn them by heart."""


@dataclass(frozen=True)
class IPAdapter(DiffusionMethod):
    """Hyper-parameters of IP-Adapter; `attach` acts on a loaded base.

    Example:
        >>> handle = IPAdapter().attach(base)  # doctest: +SKIP
        >>> handle.show([[picture]], scale=0.6)  # doctest: +SKIP
        >>> base.pipe("on a blue background").images[0]  # doctest: +SKIP
    """

    kind: Literal["base", "plus"] = "base"
    """What is looked at: CLIP's one feature of the picture (base), or its patches, for more detail (plus)."""
    image_encoder: str | None = None
    """CLIP whose image tower looks: a folder of transformers, or a hub id. None is pocket-clip's, and for pocket-sd."""
    init: str | None = None
    """Adapter to go on from: a folder or file, native or IP-Adapter's own. None trains from scratch, which takes many
    pictures."""
    queries: int = 16
    """Tokens that plus makes of a picture; base always makes 4."""
    drop: float = 0.05
    """Share of rows that go without their picture; as many go without their text, and as many without both."""
    snr_gamma: float | None = None
    """Min-SNR's gamma (the paper's is 5); None weights all noise levels equally."""

    default_learning_rate = 1e-4
    weight_decay = 0.01
    train_defaults: ClassVar[dict[str, Any]] = {"batch_size": 8}

    def __post_init__(self) -> None:
        require("method.kind", self.kind, self.kind in ("base", "plus"), "base or plus")
        require("method.queries", self.queries, 1 <= self.queries <= 256, "1 to 256")
        require("method.drop", self.drop, 0 <= self.drop <= 0.3, "0 to 0.3")
        gamma = self.snr_gamma
        require("method.snr_gamma", gamma, gamma is None or gamma > 0, "a number above 0")

    @property
    def trigger(self) -> str:  # type: ignore[override]
        """No word: a picture calls what it shows."""
        return ""

    @property
    def patches(self) -> bool:
        """Whether the encoder's patches are looked at."""
        return self.kind == "plus"

    def prompts(self, caption: str | None) -> list[str]:
        """A picture's own caption, or no text: the picture is the prompt."""
        return [caption or ""]

    def encoder(self, base: DiffusionBase) -> ImageEncoder:
        """The image encoder.

        Raises:
            InputError: none was named, and the base does not tell which.
        """
        name = self.image_encoder or ("pocket-clip" if base.name == "pocket-sd" else None)
        if name is None:
            remedy = 'Name one, such as "laion/CLIP-ViT-H-14-laion2B-s32B-b79K" for adapters of Stable Diffusion 1'
            raise InputError("method.image_encoder", f"{base.name} does not tell which looks at the pictures", remedy)
        return image_encoder(name, base.device)

    def sources(
        self, base: DiffusionBase, subject: Subject, slot: int, table: PromptTable, cache: Cache
    ) -> Iterator[Source]:
        """Yields the pictures, each with what the encoder sees in it.

        Raises:
            InputError: too few pictures to train from scratch.
        """
        count = len(subject.pictures)
        if self.init is None and count < FEWEST:
            reason = f"{count} pictures are learnt by heart by an adapter that starts from scratch (under {FEWEST})"
            remedy = "For one concept use textual_inversion, lora or custom_diffusion, or give method.init an adapter"
            raise InputError(subject.data.path, reason, remedy)
        seen = _seen(self.encoder(base), subject.dataset, self.patches, cache)
        extras = {"picture": seen, "shown": torch.ones(seen.shape[:2])}
        drops = Drops(table.rows(slot, [""])[0], self.drop, self.drop, self.drop)
        for source in super().sources(base, subject, slot, table, cache):
            yield replace(source, extras=extras, drops=drops)

    @classmethod
    def attach_jobs(cls, work: Work) -> tuple[PicturePrompts, Encode]:
        """Attaches one job's adapter; text comes from the cache.

        Raises:
            InputError: several jobs.
        """
        if len(work.subjects) > 1:
            raise InputError(f"{len(work.subjects)} jobs", "ip_adapter trains one at a time", "Train them one by one")
        subject, base = work.subjects[0], work.base
        text = encoded(base, [prompt for _, prompt in work.table.entries], work.cache)
        handle = subject.method.attach(base, subject.job.train.seed)
        handle.examples = subject.dataset
        return handle, lambda rows: {name: part[rows.to(part.device)] for name, part in text.items()}

    def attach(self, base: DiffusionBase, seed: int = 0) -> PicturePrompts:
        """Attaches to a base: the projection is drawn from a seed, or all is what `init` names.

        Raises:
            InputError: a base or an `init` of another kind.
            SiteError: cross attentions of another form.
        """
        encoder = self.encoder(base)
        handle = PicturePrompts(base, self, _drawn(base, self, encoder.width(self.patches), seed), encoder.name)
        handle.watch(encoder)
        if self.init is not None:
            try:
                handle.load(_started(self, encoder).tensors)
            except GraftError:
                handle.detach()
                raise
        return handle

    @classmethod
    def attach_to(cls, base: DiffusionBase, tensors: Mapping[str, Tensor], card: Card) -> PicturePrompts:
        """Attaches a trained adapter; its image encoder is loaded when it is shown a picture."""
        method = from_dict(cls, card.config, "adapter.json")
        first = tensors.get("image_proj.proj_in.weight" if method.patches else "image_proj.proj.weight")
        if first is None:
            raise FormatError("image_proj", f"holds no projection of kind {method.kind}", "give a whole adapter")
        name = card.details.get("image_encoder") or method.image_encoder
        return loaded(
            PicturePrompts(base, method, _drawn(base, method, first.shape[1], 0), name, card.details), tensors
        )

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes `ip_adapter.safetensors` and, beside it, the folder `image_encoder`, for `pipe.load_ip_adapter`.

        Raises:
            InputError: another format.
        """
        if format != "diffusers":
            raise InputError(f"format {format!r}", "IP-Adapter is not written in it", "use native or diffusers")
        name = adapter.card.details.get("image_encoder") or adapter.card.config.get("image_encoder")
        files = [
            write_tensors(Path(folder) / FILE, adapter.tensors, {"format": "pt", **provenance.header(adapter.card)})
        ]
        if name:
            encoder = same_encoder(name, torch.device("cpu"), adapter.card.details)
            files.append(encoder.save(Path(folder) / "image_encoder"))
        return files


class Projection(nn.Module):
    """A picture's feature to tokens: (b, given) -> (b, 4, made)."""

    def __init__(self, given: int, made: int):
        super().__init__()
        self.proj, self.norm = nn.Linear(given, BASE_TOKENS * made), nn.LayerNorm(made)

    def forward(self, feature: Tensor) -> Tensor:
        """(b, given) -> (b, 4, made)."""
        tokens: Tensor = self.norm(self.proj(feature).unflatten(-1, (BASE_TOKENS, -1)))
        return tokens


class Bank(nn.Module):
    """What is trained, by the names of IP-Adapter's files.

    Args:
        unet: whose cross attentions get keys and values.
        method: kind and queries.
        given: width of the encoder's features.
    """

    def __init__(self, unet: nn.Module, method: IPAdapter, given: int):
        super().__init__()
        attentions = list(cross_attentions(unet).values())
        made = attentions[0].to_k.in_features
        self.image_proj: nn.Module
        if method.patches:
            self.image_proj = Resampler(given, made, method.queries, width=min(1280, made))
        else:
            self.image_proj = Projection(given, made)
        # Files count the attentions of the denoiser, in which every other one is a self attention.
        self.ip_adapter = nn.ModuleDict({str(2 * i + 1): KeysValues(each) for i, each in enumerate(attentions)})


def _drawn(base: DiffusionBase, method: IPAdapter, given: int, seed: int) -> Bank:
    """The bank as it starts.

    Raises:
        InputError: a base without a UNet, or one that has an IP-Adapter.
    """
    unet = getattr(base.pipe, "unet", None)
    if unet is None:
        raise InputError(base.name, "its denoiser is no UNet", "Use a base of Stable Diffusion 1, 2 or XL")
    for name, attention in cross_attentions(unet).items():
        kind = type(attention.processor).__name__
        if not isinstance(attention.processor, ShortAttention) and kind not in ("AttnProcessor", "AttnProcessor2_0"):
            raise SiteError(name, f"a {kind} is there already", "detach it; one adapter can be shown several pictures")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Bank(unet, method, given).to(base.device)


def _started(method: IPAdapter, encoder: ImageEncoder) -> Adapter:
    """The adapter that `init` names.

    Raises:
        InputError: another method, or another kind.
        BaseMismatchError: trained with another image encoder.
    """
    assert method.init is not None
    adapter = load_adapter(method.init)
    for name, found, wanted in (
        ("method", adapter.card.method, "ip_adapter"),
        ("kind", adapter.card.config.get("kind"), method.kind),
    ):
        if found != wanted:
            raise InputError(f"method.init = {method.init!r}", f"its {name} is {found}", f"Give one of {wanted}")
    wanted = adapter.card.details.get("image_encoder_hash", encoder.hash)
    if encoder.hash != wanted:
        given = f"image encoder {encoder.name} with hash {encoder.hash}"
        raise BaseMismatchError(given, f"{method.init} was trained with {wanted}", "use that one")
    return adapter


def _seen(encoder: ImageEncoder, dataset: Dataset, patches: bool, cache: Cache) -> Tensor:
    """What the encoder sees in every variant of every picture: (p, k, ...)."""
    rows = []
    for keys, variants in zip(dataset.keys, dataset.pixels, strict=True):
        named = [content_key("pictures-1", key, encoder.hash, patches) for key in keys]
        looks = [partial(_look, encoder, pixels, patches) for pixels in variants]
        rows.append([cache.get("pictures", key, look) for key, look in zip(named, looks, strict=True)])
    return torch.stack([torch.cat([entry["seen"] for entry in row]) for row in rows])


def _look(encoder: ImageEncoder, pixels: Tensor, patches: bool) -> dict[str, Tensor]:
    return {"seen": encoder.features([as_picture(pixels)], patches)}
