"""The desk of a data set: cut a picture, and paint what of it is to be learnt.

A mask goes where training looks for it, `name.mask.png` beside the picture. What a picture was before its first cut
stays in the hidden folder `.originals`, so that everything can be taken back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageChops, ImageOps

from graft.app import uploads
from graft.app.handlers import QUIET, note, told
from graft.app.place import Place
from graft.studio.disk import write_atomic
from graft.studio.errors import InputError
from graft.studio.pictures import open_picture

SIDE = 2048
"""Pixels of a picture's longer side on the desk; what is cut there stays of that size."""
COLOUR = (255, 77, 109)
PAINTED = 64
"""Of 255: what the brush covers more than that is marked."""
ORIGINALS = ".originals"
NOTICE = "() => { if (window.editor) window.editor.notify('change') }"
"""Gradio 6.31 sends a picture that was only cut as it was before, unless its editor is told of the change."""


def build(
    place: Place, data_set: gr.Textbox, version: gr.Number, goal: gr.Dropdown, masks: Callable[[str], bool]
) -> None:
    """Draw the desk.

    Args:
        place: where the pictures are.
        data_set: name of the data set.
        version: changes with it.
        goal: what the pictures are for.
        masks: tells of a goal whether its training reads masks.
    """
    with gr.Accordion("Cut and mask", open=False, elem_id="desk"):
        chosen = gr.Dropdown([], label="Picture", allow_custom_value=True, elem_id="picture")
        canvas = gr.ImageEditor(
            label="Picture", type="pil", format="png", image_mode="RGBA", sources=(), transforms=("crop",),
            layers=False, show_label=False, buttons=[], interactive=True, elem_id="canvas",
            brush=gr.Brush(colors=[("#{:02x}{:02x}{:02x}".format(*COLOUR), 0.6)], color_mode="fixed"),
        )  # fmt: skip
        gr.HTML(note("Cut the picture, or paint what is to be learnt of it; without paint all of it is."))
        with gr.Row():
            save = gr.Button("Save the cut and the mask", size="sm", elem_id="save")
            back = gr.Button("Back to the original", size="sm", elem_id="back")

    def choose(name: str, old: str | None) -> Any:
        keys = [key for key, _ in listed(place, name)]
        return gr.Dropdown(keys, value=old if old in keys else None)

    def lay(name: str, key: str | None) -> Any:
        path = dict(listed(place, name)).get(key or "")
        return on_canvas(path) if path else None

    def keep(name: str, key: str | None, goal: str, edited: dict[str, Any] | None) -> float:
        path = found(place, name, key)
        if not save_drawing(place.data_set(name), path, edited or {}, masks(goal)):
            gr.Warning("The training of this goal reads no masks: only the cut was saved.")
        gr.Info(f"{key} is saved.")
        return time.time()

    def restore(name: str, key: str | None) -> float:
        take_back(place.data_set(name), found(place, name, key))
        return time.time()

    version.change(choose, [data_set, chosen], chosen, **QUIET)
    chosen.change(lay, [data_set, chosen], canvas, **QUIET)
    kept = save.click(None, js=NOTICE).then(told(keep), [data_set, chosen, goal, canvas], version, **QUIET)
    restored = back.click(told(restore), [data_set, chosen], version, **QUIET)
    for done in (kept, restored):
        done.success(lay, [data_set, chosen], canvas, **QUIET)


def listed(place: Place, name: str) -> list[tuple[str, Path]]:
    """The pictures of a data set by their names there."""
    try:
        folder = place.data_set(name)
    except InputError:
        return []
    return [(path.relative_to(folder).as_posix(), path) for path in uploads.pictures(folder)]


def found(place: Place, name: str, key: str | None) -> Path:
    """A picture of a data set.

    Raises:
        InputError: there is none of that name.
    """
    path = dict(listed(place, name)).get(key or "")
    if path is None:
        raise InputError(f"picture {key or ''!r}", "there is no such picture", "Choose one of the list")
    return path


def on_canvas(path: Path) -> dict[str, Any]:
    """A picture and its mask as the editor shows them."""
    picture = open_picture(path.read_bytes())
    picture.thumbnail((SIDE, SIDE))
    layers, mask = [], uploads.mask_file(path)
    if mask.is_file():
        alpha = open_picture(mask.read_bytes(), "black").convert("L").resize(picture.size)
        layer = Image.new("RGBA", picture.size, (*COLOUR, 0))
        layer.putalpha(alpha.point(lambda value: 153 if value > 127 else 0))
        layers = [layer]
    return {"background": picture, "layers": layers, "composite": None}


def save_drawing(folder: Path, path: Path, edited: dict[str, Any], masks: bool = True) -> bool:
    """Write a picture's cut and its mask; return False if it has a mask that nobody would read.

    Args:
        folder: of the data set.
        path: of the picture.
        edited: `background`, `layers`: as the editor tells them.
        masks: whether the training reads them.
    """
    picture = open_picture(path.read_bytes())
    shown, cut = ImageOps.contain(picture, (SIDE, SIDE)).size, edited.get("background")
    shown = shown if max(picture.size) > SIDE else picture.size
    if cut is not None and cut.size != shown and min(cut.size) >= 8:
        original = folder / ORIGINALS / path.relative_to(folder)
        if not original.exists():
            write_atomic(original, path.read_bytes())
        picture = cut.convert("RGB")
        write_atomic(path, png(picture))
    marked = Image.new("L", picture.size)
    for layer in edited.get("layers") or []:
        if layer is not None:
            alpha = layer.convert("RGBA").getchannel("A").resize(picture.size)
            marked = ImageChops.lighter(marked, alpha.point(lambda value: 255 if value > PAINTED else 0))
    file = uploads.mask_file(path)
    if marked.getbbox() is None:
        file.unlink(missing_ok=True)
    elif masks:
        write_atomic(file, png(marked))
    else:
        return False
    return True


def take_back(folder: Path, path: Path) -> None:
    """Bring a picture back as it was uploaded, without a mask."""
    original = folder / ORIGINALS / path.relative_to(folder)
    if original.is_file():
        original.replace(path)
    uploads.mask_file(path).unlink(missing_ok=True)


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    data = BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
