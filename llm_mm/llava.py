"""Visual instruction tuning in two stages: first the projector alone, then the language model with it.

Haotian Liu, Chunyuan Li, Qingyang Wu, Yong Jae Lee: Visual Instruction Tuning, 2023, arXiv:2304.08485; the recipe of
LoRA and the learning rates are those of Liu et al.: Improved Baselines with Visual Instruction Tuning, 2023,
arXiv:2310.03744.

    y = LM([P(V(picture)); text]),    loss = - mean log p(answer | picture, text before it)

V is the image tower (`vision`), P the projector, LM the language model (`language`). Stage 1 trains P alone, from
scratch with `fresh`; stage 2 trains P and LM, from a stage 1's result with `start`. Each part is frozen, trained in
full or by LoRA (rank (in + out) numbers a layer), at a learning rate of its own.

Differs from the authors' code: labels come from the chat template's own marks; both stages write the same adapter file
and resume from it; every sample that has nothing to learn is refused instead of trained on silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graft.llm_mm.method import TRAIN, MultimodalMethod
from graft.llm_mm.parts import is_dead, part_of
from graft.studio.config import from_dict, require
from graft.studio.errors import InputError
from graft.studio.method import loaded
from graft.studio.methods.lora import LoRA
from graft.studio.sites import Model, Plan, Site, plan_sites
from graft.studio.slots import Handle
from graft.studio.weights import WeightsHandle

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter, Card

Way = Literal["frozen", "lora", "full"]
_RATES = {("projector", 1): 1e-3, ("projector", 2): 2e-5, ("lora", 2): 2e-4, ("full", 2): 2e-5}


@dataclass(frozen=True)
class LlavaTuning:
    """Which parts of the model learn, and how fast.

    Example:
        >>> handle = LlavaTuning(stage=1).attach(base.model)  # doctest: +SKIP
    """

    stage: Literal[1, 2] = 2
    """1 trains the projector alone, 2 what the next three say."""
    language: Way = "lora"
    """How the language model is trained in stage 2."""
    projector: Way = "full"
    """How the projector is trained; in stage 1 it is in full."""
    vision: Way = "frozen"
    """How the image tower is trained in stage 2."""
    rank: int = 8
    """Inner width of LoRA's change."""
    alpha: float = 8.0
    """Numerator of its scale."""
    dropout: float = 0.0
    """Probability of dropping an input element of LoRA's path."""
    targets: str | tuple[str, ...] = "all-linear"
    """Layers with LoRA: roles (q k v o up gate down), attention, mlp, all-linear, or patterns of whole paths."""
    language_rate: float | None = None
    """Learning rate of the language model; none is the paper's, 2e-4 with LoRA and 2e-5 in full."""
    projector_rate: float | None = None
    """Of the projector; none is the paper's, 1e-3 in stage 1 and 2e-5 in stage 2."""
    vision_rate: float | None = None
    """Of the image tower; none is a tenth of the language model's."""
    fresh: bool = False
    """Draw the projector anew, as for a tower and a language model that have not met."""
    start: str = ""
    """Run's result or adapter folder whose projector is taken over, such as a stage 1's."""

    train_defaults: ClassVar[Mapping[str, Any]] = TRAIN

    def __post_init__(self) -> None:
        self.lora  # noqa: B018  (checks its settings)
        for name in ("language_rate", "projector_rate", "vision_rate"):
            rate = getattr(self, name)
            require(f"method.{name}", rate, rate is None or 0 < rate < 100, "a number above 0")
        require("method.fresh", self.fresh, not (self.fresh and self.start), "false beside method.start")
        if self.fresh and self.ways["projector"] != "full":
            raise InputError("method.fresh", "a projector drawn anew must be trained in full", "Set projector = 'full'")
        require("method", self.ways, any(way != "frozen" for way in self.ways.values()), "a part that is not frozen")

    @property
    def ways(self) -> dict[str, Way]:
        """How each part is trained."""
        if self.stage == 1:
            return {"vision": "frozen", "projector": "full", "language": "frozen"}
        return {"vision": self.vision, "projector": self.projector, "language": self.language}

    @property
    def lora(self) -> LoRA:
        """The LoRA of the parts that have it."""
        return LoRA(self.rank, self.alpha, self.dropout, targets=self.targets)

    def rates(self) -> dict[str, float]:
        """Returns the learning rate of each part."""
        way = "lora" if self.ways["language"] == "lora" else "full"
        language = self.language_rate or _RATES[way, 2]
        projector = self.projector_rate or (_RATES["projector", self.stage])
        return {"language": language, "projector": projector, "vision": self.vision_rate or language / 10}

    @property
    def default_learning_rate(self) -> float:
        """The largest of the trained parts'; `train.learning_rate`, if given, takes its place and moves the others."""
        return max(rate for part, rate in self.rates().items() if self.ways[part] != "frozen")

    def _of(self, way: str) -> set[str]:
        return {part for part, how in self.ways.items() if how == way}

    def lora_plan(self, model: Model) -> Plan:
        """Returns the sites of LoRA; none where no part has it."""
        parts, root = self._of("lora"), _root(model)
        if not parts:
            return Plan(())
        found = plan_sites(model, self.targets, self.lora.kinds)
        sites = tuple(site for site in found if part_of(site.name) in parts and not is_dead(site.name, root))
        if missing := parts - {part_of(site.name) for site in sites}:
            reason = f"it names nothing in {', '.join(sorted(missing))}"
            raise InputError(f"method.targets = {self.targets!r}", reason, "Choose other targets, or freeze that part")
        return Plan(sites, tuple(map(self.lora.count, sites)))

    def weights_plan(self, model: Model) -> Plan:
        """Returns the weights that are trained in full."""
        parts, root = self._of("full"), _root(model)
        named = [(n, p) for n, p in root.named_parameters() if part_of(n) in parts and not is_dead(n, root)]
        sites = tuple(Site(name, "linear", tuple(p.shape), None, part_of(name)) for name, p in named)
        return Plan(sites, tuple(torch.Size(site.shape).numel() for site in sites))

    def plan(self, model: Model) -> Plan:
        """Returns what is trained, with its parameters."""
        lora, weights = self.lora_plan(model), self.weights_plan(model)
        return Plan((*lora, *weights), (*lora.counts, *weights.counts))

    def attach(self, model: Model, slots: int = 1, plan: Plan | None = None) -> Joined:
        """Attaches in place.

        Raises:
            InputError: more than one adapter at once, or targets that name nothing.
        """
        if slots != 1:
            raise InputError(f"{slots} slots", "weights trained in full are one set", "Attach one, or use lora")
        root, lora = _root(model), self.lora_plan(model)
        weights = self.weights_plan(model)
        return Joined(
            self.lora.attach(root, plan=lora) if len(lora) else None,
            WeightsHandle(root, weights) if len(weights) else None,
            self,
            {f"{name}.weight" for name, module in root.named_modules() if "Norm" in type(module).__name__},
        )

    @classmethod
    def attach_to(cls, base: Any, tensors: Mapping[str, Tensor], card: Card) -> Joined:
        """Attaches a trained adapter to its base, ready for inference."""
        model = base if isinstance(base, nn.Module) else base.model
        return loaded(from_dict(cls, card.config, "adapter.json").attach(model), tensors)

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes a folder of peft, the projector among its saved modules, or the merged model for transformers.

        Raises:
            InputError: another format, or weights beyond the projector in full, which are no adapter to peft.
        """
        if format == "transformers":
            return _Merged.export(adapter, folder, format)
        if format != "peft":
            raise InputError(
                f"format {format!r}", "this method is not written in it", "Use native, peft or transformers"
            )
        from graft.llm_mm.peft_folder import export

        return export(from_dict(cls, adapter.card.config, "adapter.json"), adapter, folder)


class _Merged(MultimodalMethod):
    """The way of all methods to a merged model."""


class Joined:
    """LoRA on some parts and the weights of others; has what `graft.studio.slots.Handle` has."""

    def __init__(self, lora: Handle | None, weights: WeightsHandle | None, method: LlavaTuning, scales: set[str]):
        self.lora, self.weights, self.method = lora, weights, method
        self.scales = scales  # weights of norms, which a projector drawn anew has at one
        self.handles: list[Any] = [each for each in (lora, weights) if each is not None]
        self.plan = Plan(tuple(site for each in self.handles for site in each.plan))
        self.slots, self.bank = 1, nn.Module()
        for name, each in (("lora", lora), ("weights", weights)):
            if each is not None:
                self.bank.add_module(name, each.bank)

    def before_step(self, step: int, steps: int) -> None:
        """Does nothing: LoRA has no rule of its own."""

    def after_step(self, step: int, steps: int) -> None:
        """Does nothing."""

    def penalty(self) -> None:
        """Returns nothing to add to the loss."""
        return

    def tensors(self, slot: int = 0) -> dict[str, Tensor]:
        """Returns a copy of all trained tensors by name."""
        return {name: tensor for each in self.handles for name, tensor in each.tensors(slot).items()}

    def load(self, tensors: Mapping[str, Tensor], slot: int = 0) -> None:
        """Puts tensors in.

        Raises:
            FormatError: a name missing or unknown, or a shape that does not fit.
        """
        own = set(self.weights.tensors()) if self.weights is not None else set()
        rest = {name: tensor for name, tensor in tensors.items() if name not in own}
        if self.weights is not None:
            self.weights.load({name: tensor for name, tensor in tensors.items() if name in own})
        if self.lora is not None:
            self.lora.load(rest, slot)
        elif rest:
            raise InputError(next(iter(rest)), "not part of the attached method", "Attach with its own card")

    def reset(self, slot: int, seed: int) -> None:
        """Starts anew: LoRA from a seed, weights from the base's, the projector as the method says."""
        for each in self.handles:
            each.reset(slot, seed)
        if self.method.fresh:
            self._draw(seed)
        if self.method.start:
            self._take(self.method.start)

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """Draws the projector's matrices as torch does a linear layer's; its biases are zero, its scales one.

        What else it has is a vector that stands among the tokens, and as long as one (LLaVA-NeXT's line break).
        """
        assert self.weights is not None
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.weights.bank.named_parameters():
            if part_of(name) != "projector":
                continue
            if weight.dim() > 1:
                limit = weight[0].numel() ** -0.5
                weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * limit)
            elif name in self.scales or name.endswith("bias"):
                weight.fill_(float(name in self.scales))
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * len(weight) ** -0.5)

    def _take(self, start: str) -> None:
        """Takes the projector of another adapter.

        Raises:
            InputError: it holds none, or one of another shape.
        """
        from graft.studio.adapter import load_adapter

        folder = Path(start)
        found = load_adapter(folder / "result" if (folder / "result").is_dir() else folder).tensors
        own = {name for name in (self.weights.tensors() if self.weights else {}) if part_of(name) == "projector"}
        if not own or own - set(found):
            reason = "it has no projector trained in full" if own else "this job does not train the projector in full"
            raise InputError(f"method.start = {start!r}", reason, "Give a stage 1's result, and projector = 'full'")
        assert self.weights is not None
        self.weights.load(self.weights.tensors() | {name: found[name] for name in own})

    def route(self, rows: Tensor | None) -> None:
        """Takes no rows: there is one set of weights."""
        for each in self.handles:
            each.route(rows)

    def scale(self, slot: int, value: float) -> None:
        """Sets the strength, where all of it is LoRA."""
        for each in reversed(self.handles):
            each.scale(slot, value)

    def probe(self, run: Callable[[], Tensor]) -> None:
        """Runs the model once and checks that everything trained gets a gradient."""
        for each in self.handles:
            each.probe(run)

    def merge(self, slot: int = 0) -> None:
        """Adds LoRA into the weights; those trained in full are there already."""
        for each in self.handles:
            each.merge(slot)

    def unmerge(self) -> None:
        """Takes LoRA out of the weights again."""
        for each in self.handles:
            each.unmerge()

    def detach(self) -> None:
        """Restores the base bit for bit."""
        for each in self.handles:
            each.detach()


def _root(model: Model) -> nn.Module:
    return model if isinstance(model, nn.Module) else next(iter(model.values()))
