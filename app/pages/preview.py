"""Preview: what adapters do beside their base. What is asked for, and how it is shown, is the domain's own affair.

A domain takes part by `ASKS` and `shown` in its package (`graft.studio.shown`); nothing on this page knows one by name.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from graft.app import page, uploads
from graft.app.files import shown_url
from graft.app.handlers import QUIET, current_page, note, told
from graft.app.pages.library import card_of
from graft.app.place import Place
from graft.studio import registry
from graft.studio.errors import InputError

MOST = 4
"""Adapters in a mix."""
KEPT = 20
"""Previews whose pictures stay on disk."""


def build(place: Place) -> None:
    """Draw the page."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            chosen = gr.Dropdown([], multiselect=True, max_choices=MOST, allow_custom_value=True, label="Adapters",
                                 info="Several of one base are mixed.", elem_id="adapters")  # fmt: skip
            mix = [gr.Slider(0, 2, value=1, step=0.05, visible=False, label=f"Strength {k + 1}") for k in range(MOST)]
            prompts = gr.Textbox("a photo of {token}", lines=3, label="Prompts, one a line",
                                 info="{token} stands for the trigger.", elem_id="prompts")  # fmt: skip
            drop = gr.File(label="Pictures to tell, or to follow", file_count="multiple", file_types=["image"])
            strengths = gr.Textbox("1", label="Columns", info="Strengths of the whole mix, such as 0.5, 1, 1.5.")
            with gr.Row():
                seed = gr.Number(0, precision=0, minimum=0, label="Seed", min_width=90)
                lock = gr.Checkbox(True, label="Lock the seed", min_width=90)
            with gr.Accordion("Advanced", open=False):
                steps = gr.Slider(1, 100, value=25, step=1, label="Denoising steps")
                guidance = gr.Slider(0, 20, value=3, step=0.5, label="Guidance")
            show = gr.Button("Show", variant="primary", elem_id="show")
        with gr.Column(scale=5, min_width=320):
            slider = gr.ImageSlider(label="Base, and with the adapters", visible=False, height=420, interactive=False,
                                    buttons=["fullscreen"])  # fmt: skip
            out = gr.HTML(hint(place))

    def draw(*values: Any) -> list[Any]:
        names, prompts, files, strengths, seed, lock, steps, guidance, *weights = values
        seed = int(seed or 0) if lock else secrets.randbelow(2**31)
        kind = kind_of(place, names)
        asked: dict[str, Any] = {
            "strengths": numbers(strengths), "weights": weights[: len(names)], "seed": seed,
            "pictures": [str(path) for path in safe_pictures(place, files)],
        }  # fmt: skip
        if kind == "prompts":
            asked |= {"prompts": [line.strip() for line in (prompts or "").splitlines() if line.strip()]}
            asked |= {"settings": {"steps": int(steps), "guidance": float(guidance)}}
        elif not asked["pictures"]:
            raise InputError("Pictures", "there are none", "Drop the pictures that are to be told apart")
        folder = new_folder(place)
        cells = place.models.ask("show", adapters=names, asked=asked, out=str(folder))
        return [pair(cells), table(place, cells), seed]

    def choose(request: gr.Request) -> list[Any]:
        choices = [(f"{run.id} ({card_of(run)['method']})", run.id) for run in place.adapters()]
        wanted = request.query_params.get("adapter")
        names = [wanted] if wanted in {value for _, value in choices} else [value for _, value in choices[:1]]
        return [gr.Dropdown(choices, value=names), *sliders(names), hint(place)]

    show.click(
        told(draw), [chosen, prompts, drop, strengths, seed, lock, steps, guidance, *mix], [slider, out, seed],
        concurrency_id="models", show_progress_on=out, concurrency_limit=1, api_visibility="private",
    )  # fmt: skip
    chosen.change(sliders, chosen, mix, **QUIET)
    current_page().load(choose, None, [chosen, *mix, out], **QUIET)


def hint(place: Place) -> str:
    """What stands on the page before anything is shown."""
    if place.adapters():
        return note("Choose adapters and press Show. The first time loads the base.")
    return note('No adapters yet. <a href="/teach">Teach one</a>, or start the demo on the <a href="/">first page</a>.')


def sliders(names: Sequence[str] | None) -> list[gr.Slider]:
    """A strength for each adapter of a mix; one alone has the columns for that."""
    names = names or []
    many = len(names) > 1
    return [
        gr.Slider(visible=many and k < len(names), label=f"Strength of {names[k]}" if k < len(names) else "")
        for k in range(MOST)
    ]


def kind_of(place: Place, names: Sequence[str]) -> str:
    """What the domain of the adapters asks for: "prompts" or "pictures".

    Raises:
        InputError: no adapter, or a domain that shows nothing.
    """
    if not names:
        raise InputError("Adapters", "none is chosen", "Choose one")
    domain = str(card_of(place.run(names[0]))["domain"])
    asks = getattr(registry.domain(domain), "ASKS", None)
    if asks is None:
        raise InputError(f"domain {domain!r}", "it has no preview", "Use graft eval")
    return str(asks)


def numbers(text: str) -> list[float]:
    """Strengths from a field.

    Raises:
        InputError: something else stands there.
    """
    try:
        return [float(part) for part in text.replace(",", " ").split()] or [1.0]
    except ValueError:
        raise InputError(f"Columns {text!r}", "these are no numbers", "Write strengths, such as 0.5, 1") from None


def safe_pictures(place: Place, files: Sequence[str] | None) -> list[Path]:
    """Uploaded pictures, written anew.

    Raises:
        InputError: a file is no picture, or too large.
    """
    if not files:
        return []
    folder = new_folder(place)
    refused = uploads.add_files(folder, files[:24])
    if refused:
        raise InputError(f"{len(refused)} files", "; ".join(refused[:3]), "Leave them out")
    return sorted(folder.glob("*.png"))


def new_folder(place: Place) -> Path:
    """A folder for the pictures of one preview; the oldest ones go."""
    root = place.work / "shown"
    root.mkdir(parents=True, exist_ok=True)
    for old in sorted(root.iterdir(), key=lambda path: path.stat().st_mtime)[: -2 * KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    folder = root / secrets.token_hex(8)
    folder.mkdir()
    return folder


def pair(cells: Sequence[dict[str, Any]]) -> gr.ImageSlider:
    """The base's first picture and the last column's, to slide between."""
    drawn = [cell for cell in cells if cell["picture"] and not cell["shares"]]
    first = [cell for cell in drawn if cell["row"] == drawn[0]["row"]]
    if len(first) < 2:
        return gr.ImageSlider(visible=False)
    return gr.ImageSlider(value=(enlarged(first[0]["picture"]), enlarged(first[-1]["picture"])), visible=True)


def enlarged(path: str) -> Image.Image:
    """A picture; a small one at eight times its size, its pixels kept sharp."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    scale = 8 if picture.width <= 128 else 1
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def table(place: Place, cells: Sequence[dict[str, Any]]) -> str:
    """Rows by columns: pictures, or bars of classes."""
    rows, columns = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("row", "column"))
    head = "".join(f"<th scope=col>{escape(column)}</th>" for column in columns)
    lines = []
    for row in rows:
        found = {cell["column"]: cell for cell in cells if cell["row"] == row}
        picture = next((cell["picture"] for cell in found.values() if cell["shares"]), "")
        name = drawn(place, picture, row) if picture else f"{escape(row)}"
        filled = "".join(
            f"<td>{content(place, found[column])}</td>" if column in found else "<td></td>" for column in columns
        )
        lines.append(f"<tr><th scope=row>{name}</th>{filled}</tr>")
    return (
        f'<div class="graft" id="shown"><div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></div>"
    )


def content(place: Place, cell: dict[str, Any]) -> str:
    """One cell."""
    return page.bars(cell["shares"]) if cell["shares"] else drawn(place, cell["picture"], "")


def drawn(place: Place, file: str, caption: str) -> str:
    """A picture of a preview."""
    return page.picture(caption, Path(file), shown_url(place.work, Path(file)))
