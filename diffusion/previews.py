"""Pictures of what an adapter does, drawn by the same pipeline and scheduler as inference.

A preview starts from the saved adapter, never from the trainer's own state, so what it shows is what a user will get.
Every picture has its own generator: it is the same alone, in a batch, on another day, and beside the base's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

from graft.studio.adapter import Adapter, load_adapter
from graft.studio.disk import write_atomic
from graft.studio.errors import InputError
from graft.studio.pictures import BROKEN, checked_bytes, complaint, open_picture

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase

TILE = 128
"""Smaller pictures are enlarged to this side in grids."""
SHEET = 2048
"""Width in pixels from which a sheet of all steps is reduced."""
Pictures = list[list[Image.Image]]
"""One row per prompt, one column per seed."""


@dataclass(frozen=True)
class PreviewConfig:
    """How pictures are drawn."""

    steps: int = 25
    """Denoiser calls per picture (twice that with guidance)."""
    guidance: float = 3.0
    """Classifier-free guidance scale; 1 turns it off and halves the time."""
    resolution: int = 0
    """Side in pixels; 0 takes that of the adapter's training, which is the base's own where the job named none."""
    width: int = 0
    """Of pictures that are no squares; `resolution` is their height, then."""
    negative_prompt: str = ""
    """What to keep away from."""
    batch_size: int = 8
    """Pictures drawn at once."""
    image: str = ""
    """File of the picture that an adapter of pictures is shown."""
    scale: float = 1.0
    """How strongly it is followed: 1 as trained, about 0.5 beside a text that is to count."""
    condition: str | tuple[str, ...] = ()
    """For ControlNets and T2I-Adapters, one each: a picture, from which the map is made as in training (a depth map and
    its like: the map itself), or a folder with one for each prompt."""
    ready: bool = False
    """The conditions are finished maps: nothing is made from them."""
    beside: str | tuple[str, ...] = ()
    """Further adapters of the base, attached at the same time."""
    weights: tuple[float, ...] = ()
    """Strength of each adapter, in the order in which they are named, those of `beside` last; empty is 1 for all."""
    strengths: tuple[float, ...] = (1.0,)
    """What the weights are multiplied with: a block of pictures for each."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or min(self.guidance, self.resolution, self.width) < 0:
            raise InputError(str(self), "steps and batch_size must be at least 1, the rest not negative", "Change it")


def mixed(base: DiffusionBase) -> torch.autocast:
    """Autocast to the denoiser's type where that is narrower than the text encoder's, as in training."""
    narrow = base.dtype != next(base.pipe.text_encoder.parameters()).dtype
    return torch.autocast(base.device.type, base.dtype if narrow else torch.bfloat16, enabled=narrow)


@contextmanager
def undisturbed(base: DiffusionBase, *banks: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modes, random generators and scheduler are as before."""
    modules = [module for root in (*base.modules.values(), *banks) for module in root.modules()]
    modes, scheduler = [module.training for module in modules], base.pipe.scheduler
    base.pipe.scheduler = copy.deepcopy(scheduler)
    devices = [base.device] if base.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            for module in modules:
                module.training = False
            yield
    finally:
        base.pipe.scheduler = scheduler
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def draw(base: DiffusionBase, prompts: Sequence[str], seeds: Sequence[int], config: PreviewConfig) -> Pictures:
    """Draws every prompt from every seed with whatever is attached to the base.

    Raises:
        InputError: a resolution that the base cannot draw.
    """
    height, width = base.shape(config.resolution, config.width)
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    drawn: list[Image.Image] = []
    with undisturbed(base), mixed(base):
        for start in range(0, len(wanted), config.batch_size):
            some = wanted[start : start + config.batch_size]
            for choose in base.choosers:
                choose([(start + i) // len(seeds) for i in range(len(some))])
            drawn += base.pipe(
                prompt=[prompt for prompt, _ in some],
                height=height,
                width=width,
                num_inference_steps=config.steps,
                generator=[torch.Generator().manual_seed(seed) for _, seed in some],
                **base.guided(config.guidance, [config.negative_prompt] * len(some) if config.guidance > 1 else None),
            ).images
    for choose in base.choosers:
        choose(None)
    return [drawn[row * len(seeds) : (row + 1) * len(seeds)] for row in range(len(prompts))]


def preview(
    base: DiffusionBase,
    adapter: Adapter | Sequence[Adapter] | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    settings: PreviewConfig | None = None,
) -> list[Path]:
    """Draws prompts x seeds x strengths with the adapter, and without it for comparison.

    Args:
        base: the adapter's own.
        adapter: one, or several that act at once; None shows the base alone.
        prompts: with the adapter's trigger in them.
        seeds: one column each.
        out: folder; gets `grid.png` and one file per picture.
        settings: None takes the defaults.

    Returns:
        The files; the grid is the first.

    Raises:
        BaseMismatchError: the adapter belongs to another base.
    """
    config = as_trained(settings or PreviewConfig(), [adapter] if isinstance(adapter, Adapter) else adapter or ())
    if adapter is None:
        return save_pictures(Path(out), {"base": draw(base, prompts, seeds, config)}, prompts, seeds)
    with ExitStack() as stack:
        named = [adapter] if isinstance(adapter, Adapter) else list(adapter)
        adapters = [*named, *(load_adapter(path) for path in _several(config.beside))]
        weights = config.weights or (1.0,) * len(adapters)
        if len(weights) != len(adapters):
            reason = f"{len(adapters)} adapters are attached"
            raise InputError(f"weights = {list(weights)}", reason, "Give one for each, or none")
        handles = [stack.enter_context(each.attached(base)) for each in adapters]
        shown = show_what_is_followed(base, handles, config, len(prompts), len(seeds))
        faders = [fader(handle) for handle in handles]
        adapted = {}
        for strength in config.strengths:
            for fade, weight in zip(faders, weights, strict=True):
                fade(weight * strength)
            name = "with" if config.strengths == (1.0,) else f"with x {strength:g}"
            adapted[name] = draw(base, prompts, seeds, config)
    without = draw(base, prompts, seeds, config)
    return save_pictures(Path(out), {**shown, "without": without, **adapted}, prompts, seeds)


def as_trained(config: PreviewConfig, adapters: Sequence[Adapter]) -> PreviewConfig:
    """The settings, at the resolution that the first adapter was trained at if they name none."""
    found = (each.card.details.get("resolution") for each in adapters)
    return replace(config, resolution=config.resolution or next(filter(None, found), 0))


def fader(handle: Any, slot: int = 0) -> Callable[[float], None]:
    """What sets the strength of an attached adapter: 1 as it was trained, 0 off."""
    own = getattr(handle, "scale", None)
    parts = [part for part in (handle, *vars(handle).values()) if callable(getattr(part, "scale", None))]

    def fade(value: float) -> None:
        for part in parts:  # of a word and a LoRA, the LoRA
            part.scale(slot, value)
        if isinstance(own, int | float):
            handle.scale = own * value
        elif value != 1 and not parts:
            raise InputError(f"strength {value:g}", "a word has none: it is there or not", "Leave its weight at 1")

    return fade


def show_what_is_followed(
    base: DiffusionBase, handles: Sequence[Any], config: PreviewConfig, rows: int, columns: int = 1
) -> dict[str, Pictures]:
    """Gives ControlNets and IP-Adapters the pictures that they follow; returns these, in the places of what is drawn.

    Raises:
        InputError: there is none, too many, or no adapter follows it.
    """
    return {**_shown(base, handles, config, rows, columns), **_conditions(base, handles, config, rows)}


def _shown(
    base: DiffusionBase, handles: Sequence[Any], config: PreviewConfig, rows: int, columns: int
) -> dict[str, Pictures]:
    """Shows the configured picture to the adapters that follow one; returns it, in the places of what is drawn.

    Raises:
        InputError: there is none, or no adapter follows it.
    """
    followers = [handle for handle in handles if hasattr(handle, "show")]
    if bool(followers) != bool(config.image):
        given = f"image = {config.image!r}"
        if config.image:
            raise InputError(given, "this adapter follows no picture", "Leave it out")
        raise InputError(given, "this adapter follows a picture", "Add --set image=FILE")
    if not config.image:
        return {}
    try:
        picture = open_picture(checked_bytes(Path(config.image), 120.0), "white")
    except BROKEN as error:
        raise InputError(config.image, complaint(error), "Give the file of a picture") from error
    for handle in followers:
        handle.show([[picture]], config.scale)
    height, width = base.shape(config.resolution, config.width)
    return {"shown": [[ImageOps.fit(picture, (width, height))] * columns] * rows}


def _several(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _conditions(base: DiffusionBase, handles: Sequence[Any], config: PreviewConfig, rows: int) -> dict[str, Pictures]:
    """Gives all that is attached and follows maps its own; returns their pictures, a row per prompt.

    Raises:
        InputError: as many conditions as there are of them are needed.
    """
    controls, paths = [each for each in handles if hasattr(each, "follow_files")], _several(config.condition)
    if len(paths) != len(controls):
        reason = f"{len(controls)} ControlNets or T2I-Adapters are attached, so as many are needed"
        raise InputError(f"condition = {list(paths)}", reason, "Add --set condition=... or leave it out")
    shown: dict[str, Pictures] = {}
    for i, (control, path) in enumerate(zip(controls, paths, strict=True)):
        control.follow_files(Path(path), base.shape(config.resolution, config.width), rows, config.ready)
        blocks = control.tiles(rows)
        shown |= blocks if len(controls) == 1 else {f"{name} {i + 1}": tiles for name, tiles in blocks.items()}
    return shown


def save_pictures(out: Path, blocks: dict[str, Pictures], prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Writes the grid and every picture; returns the files, grid first."""
    files = [save_png(out / "grid.png", grid(blocks, prompts, seeds))]
    for name, rows in blocks.items():
        for i, row in enumerate(rows):
            ends = [f"-seed{seed}" for seed in seeds] if len(row) == len(seeds) else [""]
            files += [save_png(out / f"{name}-{i}{end}.png", tile) for tile, end in zip(row, ends, strict=True)]
    return files


def save_png(path: Path, picture: Image.Image) -> Path:
    """Writes a picture whole or not at all."""
    import io

    data = io.BytesIO()
    picture.save(data, "PNG")
    return write_atomic(path, data.getvalue())


def grow_sheet(folder: Path, ending: str = "") -> Path:
    """Puts the samples of all steps so far, `step-*`, one below the other; made anew each time, so a resume fits in."""
    digits = "[0-9]" * 6
    steps = [Image.open(path).convert("RGB") for path in sorted(folder.glob(f"step-{digits}{ending}.png"))]
    width = min(SHEET, max(picture.width for picture in steps))
    rows = [ImageOps.contain(picture, (width, picture.height)) for picture in steps]
    sheet = Image.new("RGB", (width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return save_png(folder / f"sheet{ending}.png", sheet)


def grid(blocks: dict[str, Pictures], prompts: Sequence[str], seeds: Sequence[int]) -> Image.Image:
    """One picture: a row per prompt, the blocks side by side, a column per seed in each, or one for all seeds."""
    first = next(iter(blocks.values()))[0][0]
    grown = max(1.0, TILE / first.height)
    across, high = round(grown * first.width), round(grown * first.height)
    gap, label, left = 8, 18, 8
    width = sum(len(rows[0]) * across + gap for rows in blocks.values()) + gap
    sheet = Image.new("RGB", (width, label + len(prompts) * (high + label) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for name, rows in blocks.items():
        for column, seed in enumerate(seeds[: len(rows[0])]):
            title = name if column == 0 else f"seed {seed}"
            pen.text((left + column * across, 3), title, "black", font)
        for r, row in enumerate(rows):
            top = 2 * label + r * (high + label)
            for column, tile in enumerate(row):
                enlarged = tile.resize((across, high), Image.Resampling.NEAREST if tile.width < across else None)
                sheet.paste(enlarged, (left + column * across, top))
        left += len(rows[0]) * across + gap
    for r, prompt in enumerate(prompts):
        pen.text((gap, label + r * (high + label) + 3), prompt, "black", font)
    return sheet
