"""What a model's image tower sees, made into prompts of its language model.

One slot listens to the tower's blocks. Another, around the part of a model that holds tower and decoder (`LlavaModel`
and its like), lays what its network makes of them before the attentions that follow: when the tower is called within,
or for features that a generation had computed before. A picture stays until the next sequence begins: a cache that is
filled belongs to the same one.

Letters: m pictures, c width of the tower, k tokens, d width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graft.llm_mm.llama_adapter import GatedPrompt
from graft.studio.errors import SiteError
from graft.studio.methods.prompt_tuning import by_name, cached
from graft.studio.network_slot import NetworkSlot
from graft.studio.sites import Model, Site, named_modules
from graft.studio.slot import Slot
from graft.studio.slots import Handle

_REMEDY = "use a model with a vision_tower and a language_model, as Llava"


class Shown(NamedTuple):
    """What the rows of a batch are shown."""

    tokens: Tensor
    """(b, k, d), zero for rows without a picture, the mean over those of rows with several."""
    there: Tensor
    """(b,), 1 for rows with a picture, else 0."""


class Sight:
    """Knows what is shown now; the slots of one handle share it."""

    now: Shown | None = None
    features: list[Tensor]
    """Of the last pictures, (m, n, c) from each block that is listened to."""
    output: Any = None
    """What the tower gave for them."""
    waiting: Callable[[], Shown] | None = None
    """Makes what is shown as soon as there are features."""


def connect(handle: Handle) -> None:
    """Makes the slots of a handle look at the same pictures."""
    sight = Sight()
    for slot in handle.slots_of(Slot):
        if isinstance(slot, PictureSlot | Ear | AddedPrompt | SeenPrompt):
            slot.sight = sight


def plan_eyes(model: Model) -> tuple[Site, Site]:
    """Returns the part of a model that holds tower and decoder, of shape (c, d), and the tower, of shape (blocks, c).

    The blocks are those that the pictures go through before the language model's projector.

    Raises:
        SiteError: there is none, or it is the model itself, which has no name.
    """
    parts = {name: module for name, module in named_modules(model).items() if _sees(module)}
    if not parts:
        raise SiteError("the model", "it reads no pictures, or in a form that is not known", _REMEDY)
    ((name, module), *_) = parts.items()
    if getattr(module.config, "image_grid_pinpoints", None):
        reason = "it shows a picture as several tiles, and these prompts are made of one view"
        raise SiteError(type(module).__name__, reason, "use llama_adapter or lora there, or a model that does not")
    if not name:
        raise SiteError(type(module).__name__, "the part that sees is the model itself", "attach to the whole model")
    config: Any = module.config
    c, d = config.vision_config.hidden_size, config.text_config.hidden_size
    tower: Any = module.vision_tower
    chosen, layers = config.vision_feature_layer, len(_layers(tower))
    blocks = max(index % (layers + 1) for index in ([chosen] if isinstance(chosen, int) else chosen))
    seen = Site(f"{name}.vision_tower", "block", (blocks, c), tower="vision", role="tower")
    return Site(name, "block", (c, d), role="pictures"), seen


def _sees(module: nn.Module) -> bool:
    tower = module._modules.get("vision_tower")
    return tower is not None and "language_model" in module._modules and bool(_layers(tower))


def _layers(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a tower, in order."""
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    return list(lists[0]) if lists else []


class Ear(Slot):
    """Keeps the features of a tower's blocks; it has nothing to train.

    Args:
        site: the tower.
        slots: how many there are.
        levels: the blocks, counted from 1.
    """

    mergeable = False
    sight: Sight

    def __init__(self, site: Site, slots: int, levels: tuple[int, ...]):
        super().__init__(site, slots)
        self.levels = levels

    def check_rows(self, x: Tensor) -> None:
        """Lets any number of pictures pass: rows may have several, or none."""

    def reset(self, slot: int) -> None:
        """Has nothing to draw."""

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the tower and keeps what its blocks give."""
        layers, heard = _layers(module), []
        hooks = [
            layers[level - 1].register_forward_hook(lambda layer, args, out: heard.append(_first(out)))
            for level in self.levels
        ]
        try:
            out = call(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        self.sight.features, self.sight.output = heard, out
        if self.sight.waiting is not None:
            self.sight.now = self.sight.waiting()
        return out


class PictureSlot(NetworkSlot):
    """The network that makes prompts of what the tower sees.

    Args:
        site: of `plan_eyes`.
        slots: how many there are.
        make: makes a network from features to (m, k, d).
        whole: whether it takes all tokens of a picture, (m, n, c), or one for all, (m, c), of each block side by side.
    """

    waits = True
    sight: Sight

    def __init__(self, site: Site, slots: int, make: Callable[[], nn.Module], whole: bool):
        super().__init__(site, slots, make)
        self.whole = whole

    def around(self, module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the model with what its rows are shown.

        Raises:
            SiteError: features of other pictures than the tower saw last.
        """
        given = by_name(module, args, kwargs)
        if cached(given):
            return call(**given)
        self.sight.now = None
        if (before := (given.get("mm_encoder_outputs") or {}).get("image")) is None:
            self.sight.waiting = partial(self.look, module, given, None)
        elif before is self.sight.output:
            self.sight.now = self.look(module, given, len(before.pooler_output))
        else:
            raise SiteError(self.site.key, "the pictures' features were computed elsewhere", "pass pixel_values")
        try:
            return call(**given)
        finally:
            self.sight.waiting = None

    def look(self, module: Any, given: dict[str, Any], pictures: int | None) -> Shown:
        """Returns what the rows are shown; ``pictures`` of a generation are several times those that the tower saw."""
        heard = self.sight.features
        times = 1 if pictures is None else pictures // len(heard[0])  # each row stands there so often
        ids = given.get("input_ids")
        words = (given["inputs_embeds"] if ids is None else ids)[::times]
        owner = self.owner(None if ids is None else words, module.config, len(words), len(heard[0]))
        owner = owner.to(heard[0].device)
        first = module.config.vision_feature_select_strategy == "default"
        one = [x[:, 0] if first else x.mean(1) for x in heard]
        tokens = self.run(torch.cat(heard if self.whole else one, -1), owner=owner * times)  # (m, k, d)
        count = torch.bincount(owner, minlength=len(words)).to(tokens.dtype)
        total = tokens.new_zeros(len(words), *tokens.shape[1:]).index_add(0, owner, tokens)
        shown = Shown(total / count.clamp(min=1)[:, None, None], count.clamp(max=1))
        return Shown(*(each.repeat_interleave(times, 0) for each in shown))

    def owner(self, ids: Tensor | None, config: Any, rows: int, pictures: int) -> Tensor:
        """Returns the row of each picture, (m,): the words' places for pictures tell.

        Raises:
            SiteError: they do not.
        """
        if ids is None:
            if rows == pictures:
                return torch.arange(rows)
            reason = f"{pictures} pictures for {rows} rows of embedded words"
            raise SiteError(self.site.key, reason, "pass input_ids, whose places for pictures tell the rows")
        places = (ids == config.image_token_id).sum(1)
        each, rest = divmod(int(places.sum()), pictures)
        if rest or not each:
            reason = f"{int(places.sum())} places in the words for {pictures} pictures"
            raise SiteError(self.site.key, reason, "let the model's processor make both")
        return torch.arange(rows, device=ids.device).repeat_interleave(places // each)


def _first(out: Any) -> Tensor:
    """The hidden states of a block's output."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


class AddedPrompt(GatedPrompt):
    """A prompt to which the picture's tokens are added."""

    sight: Sight

    def prompt(self) -> tuple[Tensor, Tensor] | None:
        """Returns the prompts, shifted by what is shown, and their gates."""
        told = super().prompt()
        if told is None or self.sight.now is None:
            return told
        return told[0] + self.sight.now.tokens, told[1]


class SeenPrompt(GatedPrompt):
    """Gates of a layer whose prompt is the picture."""

    sight: Sight

    def prompt(self) -> tuple[Tensor, Tensor] | None:
        """Returns the picture's tokens and their gates, shut for rows without one; None without pictures."""
        shown = self.sight.now
        if shown is None:
            return None
        g, strength = self.pick(self.g)
        return shown.tokens, strength[:, None] * g.tanh() * shown.there[:, None]
