"""What ControlNet and T2I-Adapter share: a trained network beside the frozen denoiser that is shown a condition map.

Such a method is a `MapMethod`, its settings; what is attached is a `Follower`, the network and a hook on the denoiser
that adds to its inputs what the network says. Several may be attached at once: what they say is added up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from graft.diffusion.buckets import Shape
from graft.diffusion.conditions import KINDS, as_squares, condition_maps, hint, maps_of_files, picture_of
from graft.diffusion.data import Dataset
from graft.diffusion.method import DiffusionMethod, Encode, PromptTable, Subject, Work, encoded
from graft.diffusion.objectives import Objective, objective_for
from graft.diffusion.task import Drops, Source
from graft.studio.caches import Cache
from graft.studio.config import from_dict, require
from graft.studio.disk import write_atomic
from graft.studio.errors import FormatError, InputError, SiteError
from graft.studio.formats import provenance
from graft.studio.formats.files import write_tensors
from graft.studio.formats.map_networks import FILE

if TYPE_CHECKING:
    from graft.diffusion.base import Condition, DiffusionBase
    from graft.studio.adapter import Adapter, Card


@dataclass(frozen=True)
class MapMethod(DiffusionMethod):
    """Settings of a method whose network follows maps."""

    condition: str = "canny"
    """What the map is: canny, soft_edge or scribble, made from the picture; depth, segmentation, pose, normal or map,
    read from files; inpaint, read from mask files, white where the picture is to be made anew."""
    empty_prompts: float = 0.5
    """Share of rows that are trained without their prompt."""
    scale: float = 1.0
    """Strength of what the network adds."""
    init: str | None = None
    """Folder or hub id of such a network of diffusers to go on from; None starts anew."""
    snr_gamma: float | None = None
    """Min-SNR's gamma (the paper's is 5); None weights all noise levels equally."""
    levels: str = "uniform"
    """How noise levels are drawn: uniform, or cubic, most of them at much noise, where composition is decided."""

    own = frozenset()
    trigger = ""
    default_learning_rate = 1e-5
    train_defaults: ClassVar[dict[str, float]] = {"weight_decay": 0.01}
    network: ClassVar[str]
    """Class of diffusers."""
    title: ClassVar[str]
    """What a message calls it."""
    section: ClassVar[str]
    """Where the card keeps the network's config."""
    follower: ClassVar[type[Follower]]
    """What is attached."""
    formats: ClassVar[tuple[str, ...]] = ("diffusers",)
    """That it is written in, beside native."""

    def __post_init__(self) -> None:
        require("method.condition", self.condition, self.condition in KINDS, "one of " + ", ".join(KINDS))
        require("method.empty_prompts", self.empty_prompts, 0 <= self.empty_prompts <= 1, "0 to 1")
        require("method.scale", self.scale, 0 < self.scale <= 10, "above 0, up to 10")
        gamma = self.snr_gamma
        require("method.snr_gamma", gamma, gamma is None or gamma > 0, "a number above 0")
        require("method.levels", self.levels, self.levels in ("cubic", "uniform"), '"cubic" or "uniform"')

    def objective(self, scheduler: Any, tokens: int) -> Objective:
        """The base's objective, on these noise levels."""
        return objective_for(scheduler, self.snr_gamma, tokens, cubic=self.levels == "cubic")

    def new(self, base: DiffusionBase) -> Any:
        """An untrained network for a base.

        Raises:
            InputError: it has none.
        """
        raise TypeError(f"{type(self).__name__} must define new")

    def misfit(self, network: Any, base: DiffusionBase) -> str:
        """Why a network that was loaded is not one of this base; empty if it is."""
        raise TypeError(f"{type(self).__name__} must define misfit")

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
    def attach_jobs(cls, work: Work) -> tuple[Follower, Encode]:
        """Attaches the network; text comes from the cache.

        Raises:
            InputError: several jobs, or a base that the network does not fit.
        """
        if len(work.subjects) > 1:
            raise InputError(f"{len(work.subjects)} jobs", f"a {cls.title} is a whole network", "Train them one by one")
        (subject,), (source, *_) = work.subjects, work.sources
        told = encoded(work.base, [text for _, text in work.table.entries], work.cache)
        handle: Follower = subject.method.attach(work.base, subject.job.train.seed)
        nn.Module.to(handle.bank, memory_format=torch.channels_last)  # as the denoiser
        handle.weight_decay = subject.job.train.weight_decay
        side = work.base.side(subject.data.resolution)
        handle.maps = as_squares(source.extras["control"][:16, 0], side)  # for samples
        return handle, lambda rows: {name: part[rows.to(part.device)] for name, part in told.items()}

    def attach(self, base: DiffusionBase, seed: int = 0) -> Follower:
        """Puts an untrained network (or the one of `init`) beside a base; it is trained in float32.

        Raises:
            InputError: there is none at `init`, or it is of another base.
        """
        if self.init is not None:
            network = self._loaded(base, self.init)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = self.new(base)
        network = nn.Module.to(network, base.device, torch.float32).train().requires_grad_(True)
        return self.follower(base, self, network)

    def _loaded(self, base: DiffusionBase, source: str) -> Any:
        """A network of diffusers."""
        import diffusers

        try:
            network = getattr(diffusers, self.network).from_pretrained(source, use_safetensors=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            remedy = "Give a folder with config.json and diffusion_pytorch_model.safetensors, or a hub id"
            raise InputError(
                f"method.init = {source!r}", f"no {self.title} can be loaded from it ({reason})", remedy
            ) from error
        if reason := self.misfit(network, base):
            raise InputError(f"method.init = {source!r}", reason, f"Use a {self.title} of this base")
        return network

    @classmethod
    def at_strength_1(cls, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """A network whose output is `scale` times that of these tensors: others know of no strength in a file."""
        raise TypeError(f"{cls.__name__} must define at_strength_1")

    @classmethod
    def attach_to(cls, base: DiffusionBase, tensors: Mapping[str, Tensor], card: Card) -> Follower:
        """Puts a trained network beside its base, which draws as ever until it is shown a map.

        Raises:
            FormatError: tensors that are not those of the network that the card describes.
        """
        import diffusers

        method = from_dict(cls, card.config, "adapter.json")
        with torch.device("meta"):
            network = getattr(diffusers, cls.network).from_config(_plain(card.details.get(cls.section)))
        try:
            network.load_state_dict(dict(tensors), assign=True)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise FormatError(f"the {cls.title}'s tensors", first, "Export the adapter again") from error
        if reason := method.misfit(network, base):
            raise FormatError(f"the {cls.title}", reason, f"Use a {cls.title} of this base")
        return cls.follower(base, method, nn.Module.to(network, base.device, base.dtype).eval().requires_grad_(False))

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes a folder for `from_pretrained` of diffusers' class, which follows maps as strongly as here.

        Raises:
            InputError: another format.
        """
        if format != "diffusers":
            remedy = f"use {', '.join(('native', *cls.formats))}"
            raise InputError(f"format {format!r}", f"a {cls.title} is not written in it", remedy)
        config = _plain(adapter.card.details.get(cls.section))
        told = {"format": "pt", **provenance.header(adapter.card)}
        tensors = cls.at_strength_1(adapter.tensors, adapter.card.config.get("scale", 1.0))
        file = write_tensors(folder / FILE, tensors, told)
        return [write_atomic(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode()), file]


class Follower:
    """A network beside a base: `bank` is the network; `detach` leaves the base as it was."""

    def __init__(self, base: DiffusionBase, method: MapMethod, network: Any):
        self.base, self.method, self.bank, self.scale = base, method, network, method.scale
        self.weight_decay = method.train_defaults["weight_decay"]
        self.maps: Tensor | None = None
        self._hint: Tensor | None = None
        self._hook = base.denoiser.register_forward_pre_hook(self._lead, with_kwargs=True)
        base.choosers.append(self._choose)

    def said(self, given: dict[str, Any], shown: Tensor) -> dict[str, Any]:
        """What the network adds: arguments of the denoiser, each a tensor or a list of them.

        Args:
            given: the denoiser's arguments, for b rows.
            shown: (r, 3, h, w) of [0, 1], maps of the rows, or of the first r that are repeated.
        """
        raise TypeError(f"{type(self).__name__} must define said")

    def must_hear(self) -> dict[str, nn.Parameter]:
        """Parameters that get a gradient at once where the denoiser hears all that the network says."""
        raise TypeError(f"{type(self).__name__} must define must_hear")

    @property
    def details(self) -> dict[str, Any]:
        """What the card keeps: the network's own config."""
        return {self.method.section: json.loads(self.bank.to_json_string())}

    def follow(self, maps: Tensor) -> None:
        """Sets what is drawn after: (r, c, h, w) uint8, one map for all prompts or one for each."""
        self.maps = maps
        self._choose(None)

    def follow_files(self, path: str | Path, side: int | Shape = 0, prompts: int = 0, ready: bool = False) -> None:
        """Sets what is drawn after from a picture, or from a folder with one for each prompt.

        Args:
            path: of the picture from which the map is made, as in training; of the map itself if it is a given one.
            side: pixels that will be drawn, or height and width; 0 takes the base's own.
            prompts: how many there will be; 0 leaves it open.
            ready: it is a finished map.

        Raises:
            InputError: nothing to read, or neither one map nor one for each prompt.
        """
        shape = side if isinstance(side, tuple) else self.base.shape(side)
        maps = maps_of_files(Path(path), self.method.condition, shape, ready)
        if prompts and len(maps) not in (1, prompts):
            raise InputError(f"condition {path}", f"{len(maps)} pictures for {prompts} prompts", "Give one, or as many")
        self.follow(maps)

    def tiles(self, prompts: int, seeds: int = 1) -> dict[str, list[list[Image.Image]]]:
        """What is drawn after, as pictures: a row for each prompt, and in it one for all seeds."""
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
        """Adds what the network says to the inputs of the denoiser; other networks may have been before."""
        if self._hint is None:
            return None
        given = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        count = len(given["sample"])
        if count % len(self._hint):  # guidance doubles the rows, prompt by prompt
            raise InputError(f"{len(self._hint)} conditions", f"{count} pictures are drawn", "Give one, or as many")
        said = self.said(given, self._hint)
        return (), given | {name: _sum(given.get(name), each) for name, each in said.items()}

    def param_groups(self) -> list[dict[str, Any]]:
        """All of the network, with the job's weight decay: it is no small word but a denoiser's half."""
        return [{"weight_decay": self.weight_decay}]

    def tensors(self, slot: int = 0) -> dict[str, Tensor]:
        """The network's tensors, by diffusers' names."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.bank.state_dict().items()}

    def probe(self, run: Callable[[], Tensor]) -> None:
        """One forward and backward: the denoiser must hear all that the network says.

        Raises:
            SiteError: naming the parameters that get no gradient.
        """
        heard = self.must_hear()
        grads = torch.autograd.grad(run(), list(heard.values()), allow_unused=True)
        dead = [name for name, grad in zip(heard, grads, strict=True) if grad is None or not grad.abs().sum() > 0]
        if dead:
            raise SiteError(", ".join(dead), "no gradient reaches it", "Use a base of Stable Diffusion 1, 2 or XL")

    def detach(self) -> None:
        """Takes the network away."""
        nn.Module.to(self.base.denoiser, memory_format=torch.contiguous_format)
        self._hook.remove()
        self.base.choosers.remove(self._choose)


def _sum(before: Any, more: Any) -> Any:
    """Tensors, or lists of them, added up; nothing may have been before."""
    if before is None:
        return more
    return before + more if isinstance(more, Tensor) else [a + b for a, b in zip(before, more, strict=True)]


def _plain(config: Any) -> dict[str, Any]:
    """A network's config as a card holds it.

    Raises:
        FormatError: the card holds none.
    """
    if not isinstance(config, dict):
        raise FormatError("adapter.json", "it does not hold the network's config", "Train it with this version")
    return config
