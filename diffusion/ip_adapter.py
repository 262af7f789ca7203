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
square of the picture as the autoencoder, not another crop of the file; attention over text and picture is one fused
operation; rows may differ in scale and in how many pictures they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from graft.diffusion.data import Dataset
from graft.diffusion.image_encoder import ImageEncoder, image_encoder
from graft.diffusion.method import DiffusionMethod, Encode, PromptTable, Subject, Work, encoded
from graft.diffusion.precision import ShortAttention
from graft.diffusion.previews import Pictures, PreviewConfig, draw
from graft.diffusion.resampler import Resampler
from graft.diffusion.task import Drops, Source
from graft.kernels.gated_attention import Group, gated_attention
from graft.studio.adapter import load_adapter
from graft.studio.caches import Cache, content_key
from graft.studio.config import from_dict, require
from graft.studio.errors import BaseMismatchError, FormatError, InputError, SiteError
from graft.studio.formats.files import write_tensors
from graft.studio.formats.ip_adapter import FILE

if TYPE_CHECKING:
    from graft.diffusion.base import Condition, DiffusionBase
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

    trigger = ""
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
        count = len(subject.dataset.pictures)
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
                handle.load(_started(self).tensors)
            except FormatError:
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
        handle = PicturePrompts(base, method, _drawn(base, method, first.shape[1], 0), name, card.details)
        handle.bank.eval().requires_grad_(False)
        try:
            handle.load(tensors)
        except FormatError:
            handle.detach()
            raise
        return handle

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes `ip_adapter.safetensors` and, beside it, the folder `image_encoder`, for `pipe.load_ip_adapter`.

        Raises:
            InputError: another format.
        """
        if format != "diffusers":
            raise InputError(f"format {format!r}", "IP-Adapter is not written in it", "use native or diffusers")
        name = adapter.card.details.get("image_encoder") or adapter.card.config.get("image_encoder")
        files = [write_tensors(Path(folder) / FILE, adapter.tensors, {"format": "pt"})]
        if name:
            encoder = _same_encoder(name, torch.device("cpu"), adapter.card.details)
            files.append(encoder.save(Path(folder) / "image_encoder"))
        return files


class KeysValues(nn.Module):
    """W_k' and W_v' of one cross attention, which start as copies of its own W_k and W_v."""

    def __init__(self, attention: Any):
        super().__init__()
        self.to_k_ip, self.to_v_ip = _copied(attention.to_k), _copied(attention.to_v)


def _copied(layer: nn.Linear) -> nn.Linear:
    copied = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    copied.weight = nn.Parameter(layer.weight.detach().float().clone())
    return copied


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


def cross_attentions(unet: Any) -> dict[str, Any]:
    """The denoiser's attentions over text, in the order of IP-Adapter's files: down, up, middle.

    Raises:
        SiteError: none, or none that tokens of one width could join.
    """
    names = [name.removesuffix(".processor") for name in getattr(unet, "attn_processors", {})]
    found = {name: unet.get_submodule(name) for name in names if not name.endswith("attn1")}
    remedy = "use a base of Stable Diffusion 1, 2 or XL"
    widths = sorted({int(each.to_k.in_features) for each in found.values() if each.to_k is not None})
    if len(widths) != 1:
        raise SiteError("unet", f"its cross attentions take text of the widths {widths}", remedy)
    for name, each in found.items():
        further = [part for part in ("group_norm", "spatial_norm", "norm_q", "add_k_proj") if getattr(each, part, None)]
        if further or each.residual_connection or each.rescale_output_factor != 1:
            raise SiteError(name, f"this attention does more ({', '.join(further) or 'residual'})", remedy)
    return found


class Shown(NamedTuple):
    """What the rows of a batch are shown."""

    tokens: Tensor
    """(b, m, d)."""
    scale: Tensor
    """(b, 1)."""


class Decoupled:
    """Attention processor of diffusers: text and picture, each with a softmax of its own.

    Args:
        handle: knows what is shown now; if nothing is, the former processor does as ever.
        own: W_k', W_v'.
        former: the processor that was there before.
    """

    def __init__(self, handle: PicturePrompts, own: KeysValues, former: Any):
        self.handle, self.own, self.former = handle, own, former

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(b, n, d) -> (b, n, d); diffusers calls it by these names."""
        shown, text = self.handle.now, encoder_hidden_states
        if shown is None or text is None:
            out: Tensor = self.former(attn, hidden_states, text, attention_mask, temb)
            return out
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        query, key, value = (_heads(x, attn) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)))
        own = (_heads(layer(shown.tokens), attn).to(query.dtype) for layer in self.own.children())
        picture = Group(next(own), next(own), shown.scale)
        if attention_mask is None:
            y = gated_attention(query, (Group(key, value), picture))
        else:
            mask = attn.prepare_attention_mask(attention_mask, text.shape[1], len(query))
            mask = mask.unflatten(0, (len(query), -1))
            y = gated_attention(query, (picture,), F.scaled_dot_product_attention(query, key, value, mask))
        layer, dropout = attn.to_out
        joined: Tensor = dropout(layer(y.transpose(1, 2).flatten(2)))
        return joined


def _heads(x: Tensor, attn: Any) -> Tensor:
    """(b, n, h * d) -> (b, h, n, d)."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


class PicturePrompts:
    """An attached IP-Adapter: `bank` holds what is trained, `show` says what the pipeline's next pictures follow.

    Args:
        base: gets other processors in its cross attentions.
        method: kind and queries.
        bank: its keys, values and projection.
        encoder: name of the image encoder, if it is known.
        details: of the adapter's card, whose encoder must be the same.
    """

    def __init__(
        self,
        base: DiffusionBase,
        method: IPAdapter,
        bank: Bank,
        encoder: str | None,
        details: Mapping[str, Any] | None = None,
    ):
        self.base, self.method, self.bank = base, method, bank
        self.details: dict[str, Any] = dict(details or {})
        self.now: Shown | None = None
        self.examples: Dataset | None = None
        self._name = encoder
        self._absent: Tensor | None = None
        self._told: tuple[Tensor, Tensor, Tensor] | None = None
        self._strength, self._inside = 1.0, False
        self._unet = base.pipe.unet
        own = iter(bank.ip_adapter.values())
        self._former = {}
        for name, attention in cross_attentions(self._unet).items():
            self._former[name] = attention.processor
            attention.set_processor(Decoupled(self, next(own), attention.processor))  # type: ignore[arg-type]
        self._hook = self._unet.register_forward_pre_hook(self._before, with_kwargs=True)

    def watch(self, encoder: ImageEncoder) -> None:
        """Takes an encoder, which the adapter's card will name."""
        self._name, self._absent = encoder.name, encoder.absent(self.method.patches)
        self.details = {"image_encoder": encoder.name, "image_encoder_hash": encoder.hash}

    def _encoder(self) -> ImageEncoder:
        """The image encoder.

        Raises:
            InputError: the adapter's file does not tell which.
            BaseMismatchError: it is not the one that the adapter was trained with.
        """
        if self._name is None:
            reason = "its file does not tell which image encoder looks at pictures"
            raise InputError("the adapter", reason, "Put the folder image_encoder beside the file")
        return _same_encoder(self._name, self.base.device, self.details)

    def tensors(self, slot: int = 0) -> dict[str, Tensor]:
        """What a trained adapter keeps, by the names of IP-Adapter's files."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.bank.state_dict().items()}

    def load(self, tensors: Mapping[str, Tensor], slot: int = 0) -> None:
        """Sets what is trained.

        Raises:
            FormatError: names or shapes that this base and method do not have.
        """
        own = self.bank.state_dict()
        for name in sorted(own.keys() ^ tensors.keys()):
            reason = "missing from the adapter" if name in own else f"not part of kind {self.method.kind} on this base"
            raise FormatError(name, reason, "use the base and the kind that it was made for")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                reason = f"shape {tuple(tensor.shape)} for {tuple(own[name].shape)}"
                raise FormatError(name, reason, "use the base and the image encoder that it was made for")
        self.bank.load_state_dict(dict(tensors))

    def scale(self, slot: int, value: float) -> None:
        """Sets the strength of all that is shown: 1 as trained, 0 off."""
        self._strength = value

    @torch.no_grad()
    def show(self, rows: Sequence[Sequence[Image.Image]], scale: float | Sequence[float] = 1.0) -> None:
        """Says what the pictures that the pipeline draws from now on follow.

        Args:
            rows: pictures for each prompt, whose tokens are joined; or one list for all prompts. None at all: the base
                as it is.
            scale: strength, or one for each list. Advice of the authors: 1 without text, about 0.5 beside text.

        Raises:
            InputError: a list without pictures, or another number of scales.
        """
        self._told = None
        if not rows:
            return
        scales = [scale] * len(rows) if isinstance(scale, int | float) else list(scale)
        if len(scales) != len(rows) or not all(rows):
            remedy = "Give at least a picture to each prompt (scale 0 leaves it out), and one scale or as many as lists"
            raise InputError(f"{len(scales)} scales for {[len(row) for row in rows]} pictures", "do not fit", remedy)
        encoder, patches, device = self._encoder(), self.method.patches, self.base.device
        with torch.autocast(device.type, enabled=False):
            seen = encoder.features([picture for row in rows for picture in row], patches)
            tokens = self.bank.image_proj(seen).split([len(row) for row in rows])
            absent = self.bank.image_proj(encoder.absent(patches).to(device))
        # Attention over keys that all come twice is the same; so rows with fewer pictures repeat theirs.
        most = math.lcm(*(len(row) for row in rows))
        joined = torch.stack([each.repeat(most // len(each), 1, 1).flatten(0, 1) for each in tokens])
        self._told = joined, absent.repeat(1, most, 1), torch.tensor(scales, device=device)[:, None]

    def _before(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Lays out what is shown over the rows that the pipeline asks for; with guidance, half of them see nothing."""
        if self._inside:
            return
        self.now = None
        if self._told is None or self._strength == 0 or not bool(self._told[2].any()):
            return
        tokens, absent, scales = self._told
        b = len(args[0] if args else kwargs["sample"])
        guided = bool(getattr(self.base.pipe, "do_classifier_free_guidance", False)) and b % 2 == 0
        rows = b // 2 if guided else b
        if rows % len(tokens):
            given = f"pictures for {len(tokens)} prompts"
            raise InputError(given, f"the pipeline draws {rows} at once", "Show one list for all, or one each")
        tokens, scales = (x.repeat_interleave(rows // len(x), dim=0) for x in (tokens, scales * self._strength))
        if guided:
            tokens, scales = torch.cat([absent.expand_as(tokens), tokens]), torch.cat([scales, scales])
        self.now = Shown(tokens, scales)

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The denoiser's prediction; `condition` has "picture", the encoder's features, and "shown", 0 or 1 (b,)."""
        assert self._absent is not None
        seen = condition["picture"].float()
        shown = condition["shown"].view(-1, *[1] * (seen.dim() - 1)) > 0
        tokens = self.bank.image_proj(torch.where(shown, seen, self._absent.to(seen)))
        scale = torch.full((len(seen), 1), self._strength, device=seen.device)
        self.now, self._inside = Shown(tokens, scale), True
        try:
            return self.base.denoise(noisy, timesteps, condition)
        finally:
            self._inside = False

    def probe(self, run: Callable[[], Tensor]) -> None:
        """One forward and backward: every tensor must get a gradient.

        Raises:
            SiteError: naming those that get none.
        """
        absent, parameters = self._absent, dict(self.bank.named_parameters())
        assert absent is not None
        self._absent = torch.ones_like(absent)  # a batch in which no row is shown its picture must not look dead
        try:
            gradients = torch.autograd.grad(run().sum(), list(parameters.values()), allow_unused=True)
        finally:
            self._absent = absent
        dead = [n for n, g in zip(parameters, gradients, strict=True) if g is None or not bool(g.count_nonzero())]
        if dead:
            raise SiteError(", ".join(dead), "no gradient reaches them", "Check the pictures and the base")

    def samples(self, prompts: Sequence[str], seeds: Sequence[int], config: PreviewConfig) -> dict[str, Pictures]:
        """Pictures of the training data, one for each seed, and what is drawn of each and every prompt."""
        assert self.examples is not None
        pixels = self.examples.pixels[:, 0]
        chosen = [_picture(pixels[i * len(pixels) // len(seeds)]) for i in range(len(seeds))]
        columns = []
        try:
            for picture, seed in zip(chosen, seeds, strict=True):
                self.show([[picture]])
                columns.append([row[0] for row in draw(self.base, prompts, [seed], config)])
        finally:
            self.show([])
        return {"shown": [chosen] * len(prompts), "drawn": [list(row) for row in zip(*columns, strict=True)]}

    def detach(self) -> None:
        """Restores the base's own processors. A second time does nothing."""
        for name, processor in self._former.items():
            self._unet.get_submodule(name).set_processor(processor)
        self._former = {}
        self._hook.remove()


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


def _started(method: IPAdapter) -> Adapter:
    """The adapter that `init` names.

    Raises:
        InputError: another method, or another kind.
    """
    assert method.init is not None
    adapter = load_adapter(method.init)
    for name, found, wanted in (
        ("method", adapter.card.method, "ip_adapter"),
        ("kind", adapter.card.config.get("kind"), method.kind),
    ):
        if found != wanted:
            raise InputError(f"method.init = {method.init!r}", f"its {name} is {found}", f"Give one of {wanted}")
    return adapter


def _same_encoder(name: str, device: torch.device, details: Mapping[str, Any]) -> ImageEncoder:
    encoder, wanted = image_encoder(name, device), details.get("image_encoder_hash")
    if wanted and encoder.hash != wanted:
        given = f"image encoder {name} with hash {encoder.hash}"
        raise BaseMismatchError(given, f"the adapter was trained with {wanted}", "bring that one back")
    return encoder


def _seen(encoder: ImageEncoder, dataset: Dataset, patches: bool, cache: Cache) -> Tensor:
    """What the encoder sees in every variant of every picture: (p, k, ...)."""
    rows = []
    for keys, variants in zip(dataset.keys, dataset.pixels, strict=True):
        named = [content_key("pictures-1", key, encoder.hash, patches) for key in keys]
        looks = [partial(_look, encoder, pixels, patches) for pixels in variants]
        rows.append([cache.get("pictures", key, look) for key, look in zip(named, looks, strict=True)])
    return torch.stack([torch.cat([entry["seen"] for entry in row]) for row in rows])


def _look(encoder: ImageEncoder, pixels: Tensor, patches: bool) -> dict[str, Tensor]:
    return {"seen": encoder.features([_picture(pixels)], patches)}


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
