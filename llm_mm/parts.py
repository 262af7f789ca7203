"""The three parts of a multimodal language model, by the whole paths of its modules, and a table of what is trained.

A layer's last name says nothing about its part: q_proj stands in image towers as well as in language models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

PARTS = ("vision", "projector", "language")
_NAMES: tuple[tuple[str, frozenset[str]], ...] = (
    # a merger stands inside the tower, so it is looked for first
    (
        "projector",
        frozenset({"multi_modal_projector", "merger", "deepstack_merger_list", "connector", "image_newline"}),
    ),
    ("vision", frozenset({"vision_tower", "visual", "vision_model"})),
    ("language", frozenset({"language_model", "text_model", "lm_head"})),
)


def part_of(name: str) -> str:
    """Returns the part of a module or parameter; "other" for none of them."""
    path = set(name.split("."))
    return next((part for part, names in _NAMES if path & names), "other")


def is_dead(name: str, model: Any) -> bool:
    """Whether a module of the image tower stands behind the layer whose output is read, so that it does nothing."""
    layer = getattr(model.config, "vision_feature_layer", None)
    if layer is None or part_of(name) != "vision":
        return False
    count = int(getattr(model.config.vision_config, "num_hidden_layers", 0))
    read = max(k if k >= 0 else count + 1 + k for k in ([layer] if isinstance(layer, int) else layer))
    path = name.split(".")
    if "layers" in path:
        return int(path[path.index("layers") + 1]) >= read
    return read <= count and bool({"post_layernorm", "head"} & set(path))


def table(model: nn.Module, trained: Mapping[str, int], ways: Mapping[str, str], rates: Mapping[str, float]) -> str:
    """Returns the parts with their parameters and what becomes of them.

    Args:
        model: with whatever is attached.
        trained: trained numbers of each part.
        ways: how each is trained, such as "LoRA" or "full"; the others are frozen.
        rates: learning rate of each trained part.
    """
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    dead = 0
    for name, parameter in model.named_parameters():
        counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
        dead += parameter.numel() if is_dead(name, model) else 0
    lines: list[Sequence[str]] = [("part", "parameters", "how", "trained", "learning rate")]
    for part, count in counts.items():
        rate = f"{rates[part]:.2g}" if trained.get(part) else ""
        lines.append((part, f"{count:,}", ways.get(part, "frozen"), f"{trained.get(part, 0):,}", rate))
    lines.append(("all", f"{sum(counts.values()):,}", "", f"{sum(trained.values()):,}", ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    told = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    return told + (f"\n{dead:,} parameters of the image tower stand behind the layer that is read" if dead else "")
