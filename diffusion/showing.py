"""The studio's preview of diffusion adapters: a row per prompt, a column per strength, the base first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from graft.diffusion.previews import Pictures, PreviewConfig, as_trained, draw, fader, save_png, show_what_is_followed
from graft.studio.config import from_dict
from graft.studio.shown import Asked, Shown

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase
    from graft.studio.adapter import Adapter


def shown(base: DiffusionBase, adapters: Sequence[Adapter], asked: Asked, out: Path) -> list[Shown]:
    """Draws the prompts with the base alone, and with all adapters at each strength.

    Args:
        base: the adapters' own.
        adapters: attached at the same time.
        asked: prompts, seed, strengths and weights; the first picture is what a ControlNet or IP-Adapter follows.
        out: folder for the pictures.

    Raises:
        InputError: an adapter without a strength was to have another than 1.
    """
    config = as_trained(from_dict(PreviewConfig, asked.settings, "preview"), adapters)
    word = adapters[0].card.trigger or ""
    prompts = [prompt.replace("{token}", word) for prompt in asked.prompts] or [word]
    weights = asked.weights or (1.0,) * len(adapters)
    columns: dict[str, Pictures] = {"base": draw(base, prompts, [asked.seed], config)}
    for strength in asked.strengths:
        if strength == 0:
            continue  # the base
        with ExitStack() as stack:
            handles = [stack.enter_context(adapter.attached(base)) for adapter in adapters]
            followed = _followed(handles, asked, config)
            show_what_is_followed(base, handles, followed, len(prompts))
            for handle, weight in zip(handles, weights, strict=True):
                fader(handle)(strength * weight)
            columns[f"{strength:g}"] = draw(base, prompts, [asked.seed], config)
    cells = []
    for column, rows in columns.items():
        for place, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            file = save_png(out / f"{column}-{place}.png", row[0])
            cells.append(Shown(prompt, column, str(file)))
    return cells


def _followed(handles: Sequence[object], asked: Asked, config: PreviewConfig) -> PreviewConfig:
    """The settings with the user's picture where one is followed."""
    if not asked.pictures:
        return config
    image = asked.pictures[0] if any(hasattr(handle, "show") for handle in handles) else ""
    controls = sum(hasattr(handle, "follow_files") for handle in handles)
    return replace(config, image=image, condition=(asked.pictures[0],) * controls)
