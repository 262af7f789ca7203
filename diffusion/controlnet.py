r"""ControlNet: a copy of the denoiser's encoder learns to lead the frozen denoiser by a condition map.

Zhang, Rao and Agrawala, "Adding Conditional Control to Text-to-Image Diffusion Models", 2023, arXiv:2302.05543. The
trainable copy F' of encoder and middle block reads the noisy latents x_t, the timestep t, the prompt and the map m; its
outputs go through convolutions Z_i of one pixel that start at zero, and are added to the skip connections h_i of the
frozen decoder D:

    y = D(h_1 + scale * Z_1(f_1), ..., h_n + scale * Z_n(f_n)),   f = F'(x_t + E(m), t, text)

where E is a small network of convolutions whose last one starts at zero too. So training starts exactly at the base,
whose encoder needs no backward pass. A share `empty_prompts` of all rows has an empty prompt, so that the map alone
must say what is to be seen. The network is diffusers' `ControlNetModel`, with its names. Differs from the authors'
code: E has as many halvings as the base's autoencoder, not always three.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from graft.diffusion.conditions import KINDS, as_squares, condition_maps, hint, maps_of_files, picture_of
from graft.diffusion.data import Dataset
from graft.diffusion.method import DiffusionMethod, Encode, PromptTable, Subject, Work, encoded
from graft.diffusion.task import Drops, Source
from graft.studio.caches import Cache
from graft.studio.config import from_dict, require
from graft.studio.disk import write_atomic
from graft.studio.errors import FormatError, InputError, SiteError
from graft.studio.formats.files import write_tensors

if TYPE_CHECKING:
    from graft.diffusion.base import Condition, DiffusionBase
    from graft.studio.adapter import Adapter, Card

WIDTHS = (16, 32, 96, 256)
"""Of the map's encoder E: one more than it has halvings."""


@dataclass(frozen=True)
class ControlNet(DiffusionMethod):
    """Hyper-parameters of ControlNet.

    Example:
        >>> control = ControlNet(condition="canny").attach(base)  # doctest: +SKIP
        >>> control.follow_files("sketch.png")  # doctest: +SKIP
    """

    condition: str = "canny"
    """What the map is: canny, soft_edge or scribble, made from the picture; depth, segmentation, pose, normal or map,
    read from files; inpaint, read from mask files, white where the picture is to be made anew."""
    empty_prompts: float = 0.5
    """Share of rows that are trained without their prompt."""
    scale: float = 1.0
    """Strength of what the copy adds."""
    init: str | None = None
    """Folder or hub id of a ControlNet of diffusers to go on from; None copies the base's encoder."""
    snr_gamma: float | None = None
    """Min-SNR's gamma (the paper's is 5); None weights all noise levels equally."""

    own = frozenset()
    trigger = ""
    default_learning_rate = 1e-5
    train_defaults = {"weight_decay": 0.01}

    def __post_init__(self) -> None:
        require("method.condition", self.condition, self.condition in KINDS, "one of " + ", ".join(KINDS))
        require("method.empty_prompts", self.empty_prompts, 0 <= self.empty_prompts <= 1, "0 to 1")
        require("method.scale", self.scale, 0 < self.scale <= 10, "above 0, up to 10")
        gamma = self.snr_gamma
        require("method.snr_gamma", gamma, gamma is None or gamma > 0, "a number above 0")

    def prompts(self, caption: str | None) -> list[str]:
        """The picture's caption; empty where it has none."""
        return [(caption or "").replace("{token}", self.trigger)]

    def sample_prompts(self, dataset: Dataset) -> list[str]:
        """Captions of the first pictures, which are drawn after their maps."""
        return [prompt for picture in dataset.pictures[:4] for prompt in self.prompts(picture.caption)]

    def sources(
        self, base: DiffusionBase, subject: Subject, slot: int, table: PromptTable, cache: Cache
    ) -> Iterator[Source]:
        """Yields the job's pictures with their maps."""
        maps = condition_maps(subject.dataset, subject.data, self.condition, cache)
        drops = Drops(table.rows(slot, [""])[0], prompt=self.empty_prompts)
        for source in super().sources(base, subject, slot, table, cache):
            yield replace(source, extras={"control": maps}, drops=drops)

    @classmethod
    def attach_jobs(cls, work: Work) -> tuple[Control, Encode]:
        """Attaches the copy; text comes from the cache.

        Raises:
            InputError: several jobs, or a base whose map encoder would need another shape.
        """
        if len(work.subjects) > 1:
            raise InputError(f"{len(work.subjects)} jobs", "a ControlNet is a whole network", "Train them one by one")
        (subject,), (source, *_) = work.subjects, work.sources
        told = encoded(work.base, [text for _, text in work.table.entries], work.cache)
        handle = subject.method.attach(work.base, subject.job.train.seed)
        for module in (handle.bank, work.base.denoiser):  # half of the work is convolutions, a twentieth faster so
            nn.Module.to(module, memory_format=torch.channels_last)
        handle.weight_decay = subject.job.train.weight_decay
        handle.maps = as_squares(
            source.extras["control"][:16, 0], work.base.side(subject.data.resolution)
        )  # for samples
        return handle, lambda rows: {name: part[rows.to(part.device)] for name, part in told.items()}

    def attach(self, base: DiffusionBase, seed: int = 0) -> Control:
        """Puts an untrained copy of the encoder (or the one of `init`) beside a base; it is trained in float32.

        Raises:
            InputError: there is none at `init`, or it is of another base.
        """
        network = _copied(base, seed) if self.init is None else _loaded(base, self.init)
        return Control(base, self, nn.Module.to(network, base.device, torch.float32).train().requires_grad_(True))

    @classmethod
    def attach_to(cls, base: DiffusionBase, tensors: Mapping[str, Tensor], card: Card) -> Control:
        """Puts a trained copy beside its base, which draws as ever until it is shown a map.

        Raises:
            FormatError: tensors that are not those of the network that the card describes.
        """
        from diffusers import ControlNetModel

        method = from_dict(cls, card.config, "adapter.json")
        with torch.device("meta"):
            network = ControlNetModel.from_config(_plain(card.details.get("controlnet")))
        try:
            network.load_state_dict(dict(tensors), assign=True)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise FormatError("the ControlNet's tensors", first, "Export the adapter again") from error
        return Control(base, method, nn.Module.to(network, base.device, base.dtype).eval().requires_grad_(False))

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes a folder for `ControlNetModel.from_pretrained`.

        Raises:
            InputError: another format.
        """
        if format != "diffusers":
            raise InputError(f"format {format!r}", "a ControlNet is not written in it", "use native or diffusers")
        config = _plain(adapter.card.details.get("controlnet"))
        file = write_tensors(folder / "diffusion_pytorch_model.safetensors", adapter.tensors, {"format": "pt"})
        return [write_atomic(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode()), file]


class Control:
    """A ControlNet beside a base: `bank` is the network; `detach` leaves the base as it was."""

    def __init__(self, base: DiffusionBase, method: ControlNet, network: Any):
        self.base, self.method, self.bank, self.scale = base, method, network, method.scale
        self.weight_decay = method.train_defaults["weight_decay"]
        self.maps: Tensor | None = None
        self._hint: Tensor | None = None
        self._hook = base.denoiser.register_forward_pre_hook(self._lead, with_kwargs=True)
        base.choosers.append(self._choose)

    @property
    def details(self) -> dict[str, Any]:
        """What the card keeps: the network's own config."""
        return {"controlnet": json.loads(self.bank.to_json_string())}

    def follow(self, maps: Tensor) -> None:
        """Sets what is drawn after: (r, c, h, w) uint8, one map for all prompts or one for each."""
        self.maps = maps
        self._choose(None)

    def follow_files(self, path: str | Path, side: int = 0, prompts: int = 0, ready: bool = False) -> None:
        """Sets what is drawn after from a picture, or from a folder with one for each prompt.

        Args:
            path: of the picture from which the map is made, as in training; of the map itself if it is a given one.
            side: pixels that will be drawn; 0 takes the base's own.
            prompts: how many there will be; 0 leaves it open.
            ready: it is a finished map.

        Raises:
            InputError: nothing to read, or neither one map nor one for each prompt.
        """
        maps = maps_of_files(Path(path), self.method.condition, self.base.side(side), ready)
        if prompts and len(maps) not in (1, prompts):
            raise InputError(f"condition {path}", f"{len(maps)} pictures for {prompts} prompts", "Give one, or as many")
        self.follow(maps)

    def tiles(self, prompts: int) -> dict[str, list[list[Image.Image]]]:
        """What is drawn after, as pictures: a row for each prompt."""
        assert self.maps is not None
        return {"condition": [[picture_of(self.maps[row % len(self.maps)])] for row in range(prompts)]}

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The denoiser's prediction, led by `condition["control"]`, a map for each row."""
        self._hint = hint(condition["control"])
        try:
            return self.base.denoise(noisy, timesteps, condition)
        finally:
            self._hint = None

    def _choose(self, prompts: Sequence[int] | None) -> None:
        if self.maps is not None:
            rows = range(len(self.maps)) if prompts is None else [row % len(self.maps) for row in prompts]
            self._hint = hint(self.maps[list(rows)]).to(self.base.device, self.base.dtype)

    def _lead(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Adds what the network says to the inputs of the denoiser; other ControlNets may have been before."""
        if self._hint is None:
            return None
        given = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        count = len(given["sample"])
        rounds, rest = divmod(count, len(self._hint))  # guidance doubles the rows, prompt by prompt
        if rest:
            raise InputError(f"{len(self._hint)} conditions", f"{count} pictures are drawn", "Give one, or as many")
        down, middle = self.bank(
            given["sample"],
            given["timestep"],
            encoder_hidden_states=given["encoder_hidden_states"],
            controlnet_cond=self._hint.repeat(rounds, 1, 1, 1),
            conditioning_scale=self.scale,
            added_cond_kwargs=given.get("added_cond_kwargs"),
            return_dict=False,
        )
        before, mid = given.get("down_block_additional_residuals"), given.get("mid_block_additional_residual")
        if before is not None:
            down, middle = [a + b for a, b in zip(before, down, strict=True)], mid + middle
        led = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return (), given | led

    def param_groups(self) -> list[dict[str, Any]]:
        """All of the network, with the job's weight decay: it is no small word but a denoiser's half."""
        return [{"weight_decay": self.weight_decay}]

    def tensors(self, slot: int = 0) -> dict[str, Tensor]:
        """The network's tensors, by diffusers' names."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.bank.state_dict().items()}

    def probe(self, run: Callable[[], Tensor]) -> None:
        """One forward and backward: the denoiser must hear each of the zero convolutions.

        Raises:
            SiteError: naming those that get no gradient.
        """
        zeros = {name: p for name, p in self.bank.named_parameters() if _is_zero_convolution(name)}
        grads = torch.autograd.grad(run(), list(zeros.values()), allow_unused=True)
        dead = [name for name, grad in zip(zeros, grads, strict=True) if grad is None or not grad.abs().sum() > 0]
        if dead:
            raise SiteError(", ".join(dead), "no gradient reaches it", "Use a base whose decoder has skip connections")

    def detach(self) -> None:
        """Takes the network away."""
        nn.Module.to(self.base.denoiser, memory_format=torch.contiguous_format)
        self._hook.remove()
        self.base.choosers.remove(self._choose)


def _is_zero_convolution(name: str) -> bool:
    return name.startswith(("controlnet_down_blocks.", "controlnet_mid_block.")) and name.endswith(".weight")


def _copied(base: DiffusionBase, seed: int) -> Any:
    """A copy of the base's encoder with new, seeded convolutions for the map."""
    from diffusers import ControlNetModel

    factor = int(base.pipe.vae_scale_factor)
    widths = WIDTHS[: factor.bit_length()]
    if getattr(base.pipe, "unet", None) is None or 2 ** (len(widths) - 1) != factor:
        reason = "it needs a unet whose autoencoder shrinks pictures 2, 4 or 8 times"
        raise InputError(base.name, reason, "Use a base of Stable Diffusion 1, 2 or XL")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ControlNetModel.from_unet(base.denoiser, conditioning_embedding_out_channels=widths)


def _loaded(base: DiffusionBase, source: str) -> Any:
    """A ControlNet of diffusers."""
    from diffusers import ControlNetModel

    try:
        network = ControlNetModel.from_pretrained(source, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "Give a folder with config.json and diffusion_pytorch_model.safetensors, or a hub id"
        raise InputError(
            f"method.init = {source!r}", f"no ControlNet can be loaded from it ({reason})", remedy
        ) from error
    for key in ("in_channels", "block_out_channels", "down_block_types", "cross_attention_dim", "layers_per_block"):
        theirs, own = network.config[key], base.denoiser.config[key]
        if json.dumps(theirs) != json.dumps(own):
            reason = f"its {key} is {theirs}, that of {base.name} {own}"
            raise InputError(f"method.init = {source!r}", reason, "Use a ControlNet of this base")
    return network


def _plain(config: Any) -> dict[str, Any]:
    """A network's config as a card holds it.

    Raises:
        FormatError: the card holds none.
    """
    if not isinstance(config, dict):
        raise FormatError("adapter.json", "it does not hold the network's config", "Train it with this version")
    return config
