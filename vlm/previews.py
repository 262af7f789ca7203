"""What a classifier says of pictures, with its adapter and without, as one sheet and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw

from graft.studio.disk import write_json
from graft.studio.errors import InputError
from graft.studio.pictures import find_pictures
from graft.vlm.head import Setting
from graft.vlm.pictures import to_pixels

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.vlm.base import ClipBase

_SIDE, _LINES, _COLUMNS = 160, 44, 4


@dataclass(frozen=True)
class PreviewConfig:
    """The settings of `graft preview`."""

    path: str = ""
    """A picture, or a folder of pictures."""
    pictures: int = 12
    """How many of a folder are shown, evenly spread."""

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise InputError(f"preview.pictures = {self.pictures}", "expected 1 or more", "Give a larger number")


def preview(
    base: ClipBase, adapter: Adapter, prompts: Sequence[str], seeds: Sequence[int], out: Path, config: PreviewConfig
) -> list[Path]:
    """Names pictures with the adapter and with zero-shot.

    Args:
        base: the adapter's own.
        adapter: of this domain.
        prompts: not used: the classes are the adapter's.
        seeds: not used.
        out: folder.
        config: which pictures.

    Returns:
        `sheet.png`, pictures with the two answers below each, and `answers.json`.

    Raises:
        InputError: no pictures were named.
    """
    files = _files(config)
    pixels = torch.stack([read_pixels(file, base) for file in files])
    setting = Setting(base, tuple(adapter.card.details["classes"]), tuple(adapter.card.details["templates"]))
    with torch.no_grad():
        plain = setting.zero_shot(base.encode_image(pixels).float()).softmax(-1).cpu()
    with adapter.attached(base) as classifier:
        adapted = classifier.logits_of_pixels(pixels).softmax(-1)
    rows: list[dict[str, Any]] = []
    for file, before, after in zip(files, plain, adapted, strict=True):
        answers = {"zero_shot": before, "adapter": after}
        rows.append({"file": str(file)} | {name: answer(setting.names, p) for name, p in answers.items()})
    out.mkdir(parents=True, exist_ok=True)
    _sheet(pixels, rows).save(out / "sheet.png")
    write_json(out / "answers.json", rows)
    return [out / "sheet.png", out / "answers.json"]


def read_pixels(file: Path, base: ClipBase) -> torch.Tensor:
    """Returns a picture as the image tower takes it.

    Raises:
        InputError: it is no picture.
    """
    try:
        with Image.open(file) as image:
            return to_pixels(image, base.preprocess)
    except OSError as error:
        raise InputError(str(file), f"it is no picture ({error})", "Name another one") from error


def _files(config: PreviewConfig) -> list[Path]:
    path = Path(config.path) if config.path else None
    if path is None or not path.exists():
        raise InputError(config.path or "preview.path", "there are no pictures", "Name some with --set path=PICTURES")
    found = [path] if path.is_file() else find_pictures(path)
    if not found:
        raise InputError(config.path, "the folder holds no pictures", "Name another one")
    step = max(1, len(found) / config.pictures)
    return [found[int(k * step)] for k in range(min(config.pictures, len(found)))]


def answer(names: Sequence[str], row: torch.Tensor, most: int = 3) -> dict[str, float]:
    """Returns the surest classes with their probabilities."""
    return {names[k]: round(float(row[k]), 4) for k in row.argsort(descending=True)[:most].tolist()}


def _sheet(pixels: torch.Tensor, rows: Sequence[dict[str, Any]]) -> Image.Image:
    lines = -(-len(rows) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * (_SIDE + 8), lines * (_SIDE + _LINES)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (picture, row) in enumerate(zip(pixels, rows, strict=True)):
        x, y = k % _COLUMNS * (_SIDE + 8) + 4, k // _COLUMNS * (_SIDE + _LINES) + 4
        sheet.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((_SIDE, _SIDE)), (x, y))
        for line, side in enumerate(("zero_shot", "adapter")):
            name, share = next(iter(row[side].items()))
            label = f"{'without' if side == 'zero_shot' else 'with'}: {name} {share:.2f}"
            draw.text((x, y + _SIDE + 4 + 14 * line), label, fill="black")
    return sheet
