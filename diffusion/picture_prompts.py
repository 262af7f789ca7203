"""An attached IP-Adapter: what it is shown, in training and in a pipeline's calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from graft.diffusion.data import Dataset
from graft.diffusion.decoupled_attention import Decoupled, Shown, cross_attentions
from graft.diffusion.image_encoder import ImageEncoder, as_picture, same_encoder
from graft.diffusion.previews import Pictures, PreviewConfig, draw
from graft.studio.errors import FormatError, InputError, SiteError

if TYPE_CHECKING:
    from graft.diffusion.base import Condition, DiffusionBase
    from graft.diffusion.ip_adapter import Bank, IPAdapter


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
        return same_encoder(self._name, self.base.device, self.details)

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
        scales = [scale] * len(rows) if isinstance(scale, int | float) else list(scale)
        if len(scales) != len(rows) or not all(rows):
            remedy = "Give at least a picture to each prompt (scale 0 leaves it out), and one scale or as many as lists"
            raise InputError(f"{len(scales)} scales for {[len(row) for row in rows]} pictures", "do not fit", remedy)
        if not any(scales):
            return
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
        if self._told is None or self._strength == 0:
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

    def tiles(self, prompts: int, seeds: int) -> dict[str, Pictures]:
        """Pictures of the training data, one for each seed, which samples follow: a row for each prompt."""
        return {"shown": [self._chosen(seeds)] * prompts}

    def _chosen(self, count: int) -> list[Image.Image]:
        assert self.examples is not None
        pixels = self.examples.pixels[:, 0]
        chosen = [as_picture(pixels[i * len(pixels) // count]) for i in range(count)]
        return [ImageOps.fit(picture, (min(picture.size),) * 2) for picture in chosen]

    def samples(self, prompts: Sequence[str], seeds: Sequence[int], config: PreviewConfig) -> Pictures:
        """What is drawn of every prompt and, for each seed, one of the pictures of `tiles`."""
        columns = []
        try:
            for picture, seed in zip(self._chosen(len(seeds)), seeds, strict=True):
                self.show([[picture]])
                columns.append([row[0] for row in draw(self.base, prompts, [seed], config)])
        finally:
            self.show([])
        return [list(row) for row in zip(*columns, strict=True)]

    def detach(self) -> None:
        """Restores the base's own processors. A second time does nothing."""
        for name, processor in self._former.items():
            self._unet.get_submodule(name).set_processor(processor)
        self._former = {}
        self._hook.remove()
