"""Prompt tuning: trained vectors stand before the sequence that a frozen transformer reads.

Brian Lester, Rami Al-Rfou, Noah Constant: The Power of Scale for Parameter-Efficient Prompt Tuning, 2021,
arXiv:2104.08691. On a ViT this is the shallow form of Menglin Jia et al.: Visual Prompt Tuning, 2022, arXiv:2203.12119.

    y = f([P; x]) without its first ``length`` positions

P (length, d) starts as rows of the token table drawn at random where there is one, else uniform (0.5), as in the paper:
length * d parameters. Sites are the decoders of transformers (the model under the language head; masks, positions and
caches are lengthened to match, and ``generate`` works); in a model without one the encoders of transformers, the
towers of open_clip and the ``blocks`` of timm's ViTs; and UNets of diffusers, where P stands before the text. Outputs
keep their length. Every row of a batch has a prompt, each its own if routed; there is none to merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graft.studio.errors import SiteError
from graft.studio.method import SiteMethod, check
from graft.studio.sites import Model, Plan, Site, ends, named_modules
from graft.studio.slot import Slot
from graft.studio.slotted import arguments

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter


@dataclass(frozen=True)
class PromptTuning(SiteMethod):
    """Trained vectors before the input."""

    kinds = ("tokens",)
    when = "large language models; the base runs as it is, prompts are small files"

    length: int = 100
    """Vectors; each costs as much as a token."""
    targets: str | tuple[str, ...] = ()
    """Paths of decoders, encoders, block lists or UNets, as patterns; when not given decoders, else all others."""
    towers: tuple[str, ...] | None = None
    """Not used: a path says it."""

    def __post_init__(self) -> None:
        check(self, length=(self.length >= 1, "at least 1"))

    def sites(self, model: Model) -> Plan:
        """Returns the places where sequences enter."""
        return among(sequences(model, "tokens"), self.targets)

    def count(self, site: Site) -> int:
        """Returns one vector for each position."""
        return self.length * site.shape[0]

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the vectors of a sequence."""
        return PROMPTS[site.role or ""](site, slots, self.length, module)

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes the adapter for peft."""
        from graft.studio.formats import prompts

        return prompts.export(adapter, folder) if format == "peft" else super().export(adapter, folder, format)


class PromptSlot(Slot):
    """Vectors before a sequence."""

    mergeable = False
    fades: ClassVar[bool] = False

    def __init__(self, site: Site, slots: int, length: int, module: Any):
        """Makes vectors; ``module`` has the token table that they start from, if there is one."""
        super().__init__(site, slots)
        self.table = module.get_input_embeddings if hasattr(module, "get_input_embeddings") else None
        self.P = nn.Parameter(torch.empty(slots, length, site.shape[0]))
        for slot in range(slots):
            self.reset(slot)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws the vectors."""
        values = self.P[slot]
        if self.table is None:
            values.copy_(torch.empty(values.shape).uniform_(-0.5, 0.5))
            return
        weight = self.table().weight
        values.copy_(weight[torch.randint(len(weight), (len(values),)).to(weight.device)])

    def prompts(self, like: Tensor) -> Tensor:
        """Returns the vectors of each row, (b, length, d)."""
        (prompts, _) = self.pick(self.P)
        return prompts.to(like.dtype).expand(like.shape[0], -1, -1)


class EncoderPrompt(PromptSlot):
    """Vectors before the tokens of an encoder or a list of blocks."""

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the encoder on the longer sequence and cuts it again; its mask tells whether the vectors come first."""
        given, length = by_name(module, args, kwargs), self.P.shape[1]
        name = next(name for name in ("inputs_embeds", "x", "input") if name in given)
        for masked in ("attention_mask", "attn_mask"):  # of open_clip, where it is that of a text
            if (mask := given.get(masked)) is not None:
                causal = name == "x" or bool(given.get("is_causal"))
                given[masked] = _longer(mask, length, causal, self.site.key)
        given[name] = torch.cat([self.prompts(given[name]), given[name]], 1)
        out = call(**given)
        if isinstance(out, Tensor):
            return out[:, length:]
        out["last_hidden_state"] = out["last_hidden_state"][:, length:]
        return out


def _longer(mask: Tensor, length: int, causal: bool, where: str) -> Tensor:
    """A mask (..., n, n) for a sequence with ``length`` more at its start, which are seen from everywhere.

    They see each other, and of the rest nothing if the mask is causal, else what all others see.
    """
    if mask.dim() not in (2, 4) or mask.shape[-1] != mask.shape[-2]:
        raise SiteError(where, f"an attention mask {tuple(mask.shape)} cannot be lengthened", "use prefix_tuning")
    seen, shut = (True, False) if mask.dtype == torch.bool else (0.0, float("-inf"))
    above = torch.full_like(mask[..., :1, :], shut) if causal else mask[..., :1, :]
    own = mask.new_full((length, length), seen)
    if causal:
        own = own.masked_fill(torch.ones_like(own, dtype=torch.bool).triu(1), shut)
    first = torch.cat([own.expand(*mask.shape[:-2], -1, -1), above.expand(*mask.shape[:-2], length, -1)], -1)
    return torch.cat([first, nn.functional.pad(mask, (length, 0), value=float(seen))], -2)


class TextPrompt(PromptSlot):
    """Vectors before the text that a denoiser is told."""

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the denoiser with the longer text."""
        given = by_name(module, args, kwargs)
        text, mask = given["encoder_hidden_states"], given.get("encoder_attention_mask")
        given["encoder_hidden_states"] = torch.cat([self.prompts(text), text], 1)
        if mask is not None:
            given["encoder_attention_mask"] = torch.cat([mask.new_ones(len(mask), self.P.shape[1]), mask], 1)
        return call(**given)


class DecoderPrompt(PromptSlot):
    """Vectors before the embedded tokens of a decoder."""

    def around(self, module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the decoder on the longer sequence; with a filled cache the vectors are in it already."""
        given, length = by_name(module, args, kwargs), self.P.shape[1]
        lengthen(given, length, self.site.key, within=not cached(given))
        if cached(given):
            return call(**given)
        embeds = given.pop("inputs_embeds", None)
        ids = given.pop("input_ids", None)
        embeds = module.get_input_embeddings()(ids) if embeds is None else embeds
        if (seen := given.get("visual_pos_masks")) is not None:  # where Qwen 3 VL adds what its tower sees
            given["visual_pos_masks"] = torch.cat([seen.new_zeros(len(seen), length), seen], 1)
        out = call(**given, inputs_embeds=torch.cat([self.prompts(embeds), embeds], 1))
        out["last_hidden_state"] = out["last_hidden_state"][:, length:]
        return out


PROMPTS: dict[str, type[PromptSlot]] = {
    "decoder": DecoderPrompt,
    "encoder": EncoderPrompt,
    "blocks": EncoderPrompt,
    "unet": TextPrompt,
}
"""Slot of each role that `sequences` gives."""


def sequences(model: Model, kind: str) -> list[Site]:
    """Returns where sequences enter: decoders and encoders of transformers, towers of open_clip, lists of timm's ViTs
    (role blocks), and UNets of diffusers that read a text."""
    modules = named_modules(model)
    found = []
    for name, module in modules.items():
        given, config = set(arguments(module)), getattr(module, "config", None)
        children, parent = dict(module.named_children()), modules.get(name.rpartition(".")[0])
        table = next((child for child in children.values() if isinstance(child, nn.Embedding)), None)
        role, width = "", None
        if table is not None and {"inputs_embeds", "past_key_values"} <= given:
            role, width = "decoder", table.embedding_dim
        elif {"inputs_embeds", "attention_mask"} <= given and "input_ids" not in given and "layers" in children:
            role, width = "encoder", getattr(config, "hidden_size", None)
        elif {"x", "attn_mask"} <= given and "resblocks" in children:
            role, width = "encoder", getattr(module, "width", None)
        elif {"sample", "timestep", "encoder_hidden_states"} <= given:
            projected = getattr(config, "encoder_hid_dim_type", None)
            role, width = "unet", None if projected else getattr(config, "cross_attention_dim", None)
        elif name.rpartition(".")[2] == "blocks" and isinstance(module, nn.Sequential):
            role, width = "blocks", getattr(parent, "embed_dim", None)
        if isinstance(width, int):
            found.append(Site(name, kind, (width,), role=role))
    return found


def plan_decoders(model: Model, targets: str | tuple[str, ...], kind: str) -> Plan:
    """Returns the decoders of transformers.

    Raises:
        SiteError: as `among`.
    """
    return among([site for site in sequences(model, kind) if site.role == "decoder"], targets)


def among(found: list[Site], targets: str | tuple[str, ...]) -> Plan:
    """Returns the sites that targets name by role or pattern of a path; without targets decoders, or all.

    Raises:
        SiteError: there is none, or the targets name none.
    """
    wanted = (targets,) if isinstance(targets, str) else targets
    kept = [site for site in found if any(target == site.role or ends(site.name, target) for target in wanted)]
    kept = kept if wanted else [site for site in found if site.role == "decoder"] or found
    if not kept:
        known = ", ".join(site.name for site in found) or "none"
        remedy = "use a decoder of transformers or a ViT of timm"
        raise SiteError(f"targets {wanted}", f"no sequence of the model is known by it (there is: {known})", remedy)
    return Plan(tuple(kept))


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a module's call by their names."""
    names = [name for name in arguments(module) if name not in ("args", "kwargs")]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def cached(given: Mapping[str, Any]) -> bool:
    """Whether a decoder is called with keys and values of positions before."""
    past = given.get("past_key_values")
    return past is not None and past.get_seq_length() > 0


def lengthen(given: dict[str, Any], length: int, where: str, within: bool) -> None:
    """Makes masks and positions those of a sequence with ``length`` more at its start, part of the call or before it.

    Raises:
        SiteError: a mask that is not one of tokens, (b, n).
    """
    mask = given.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise SiteError(where, "the attention mask is none of tokens, (b, n)", "pass a padding mask")
        given["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], length), mask], 1)
    positions = given.get("position_ids")
    if positions is not None:
        first = torch.arange(length, device=positions.device).expand(*positions.shape[:-1], -1)
        given["position_ids"] = torch.cat([first, positions + length], -1) if within else positions + length
