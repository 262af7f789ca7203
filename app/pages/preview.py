"""Preview: what adapters do beside their base. What is asked for, and how it is shown, is the domain's own affair.

A domain takes part by `ASKS` and `shown` in its package (`graft.studio.shown`); nothing on this page knows one by name.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from graft.app import chat
from graft.app.cells import new_folder, safe_pictures, table
from graft.app.handlers import QUIET, current_page, note, told
from graft.app.pages.library import card_of
from graft.app.place import Place
from graft.studio import registry
from graft.studio.errors import InputError

MOST = 4
"""Adapters in a mix."""


def build(place: Place) -> None:
    """Draw the page."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            chosen = gr.Dropdown([], multiselect=True, max_choices=MOST, allow_custom_value=True, label="Adapters",
                                 info="Of one base; several are mixed or compared.", elem_id="adapters")  # fmt: skip
            mix = [gr.Slider(0, 2, value=1, step=0.05, visible=False, label=f"Strength {k + 1}") for k in range(MOST)]
            with gr.Column() as drawing:
                prompts = gr.Textbox("a photo of {token}", lines=3, label="Prompts, one a line",
                                     info="{token} stands for the trigger.", elem_id="prompts")  # fmt: skip
                drop = gr.File(label="Pictures to tell, or to follow", file_count="multiple", file_types=["image"],
                               elem_id="pictures")  # fmt: skip
                strengths = gr.Textbox("1", label="Columns", info="Strengths of the whole mix, such as 0.5, 1, 1.5.")
                with gr.Row():
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed", min_width=90)
                    lock = gr.Checkbox(True, label="Lock the seed", min_width=90)
                with gr.Accordion("Advanced", open=False):
                    steps = gr.Slider(1, 100, value=25, step=1, label="Denoising steps")
                    guidance = gr.Slider(0, 20, value=3, step=0.5, label="Guidance")
                show = gr.Button("Show", variant="primary", elem_id="show")
            out = gr.HTML(hint(place), render=False)
            talking = chat.panel(place, chosen, out)
        with gr.Column(scale=5, min_width=320):
            slider = gr.ImageSlider(label="Base, and with the adapters", visible=False, height=420, interactive=False,
                                    buttons=["fullscreen"])  # fmt: skip
            out.render()

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
        return [gr.Dropdown(choices, value=names), *fields(names), hint(place)]

    def fields(names: list[str] | None) -> list[Any]:
        talked = talks(place, names or [])
        return [*sliders([] if talked else names), gr.Column(visible=not talked), gr.Column(visible=talked)]

    show.click(
        told(draw), [chosen, prompts, drop, strengths, seed, lock, steps, guidance, *mix], [slider, out, seed],
        concurrency_id="models", show_progress_on=out, concurrency_limit=1, api_visibility="private",
    )  # fmt: skip
    chosen.change(fields, chosen, [*mix, drawing, talking], **QUIET)
    current_page().load(choose, None, [chosen, *mix, drawing, talking, out], **QUIET)


def hint(place: Place) -> str:
    """What stands on the page before anything is shown."""
    if place.adapters():
        return note("Choose adapters, and press Show or ask. The first time loads the base.")
    return note('No adapters yet. <a href="/teach">Teach one</a>, or start the demo on the <a href="/">first page</a>.')


def sliders(names: Sequence[str] | None) -> list[gr.Slider]:
    """A strength for each adapter of a mix; one alone has the columns for that."""
    names = names or []
    many = len(names) > 1
    return [
        gr.Slider(visible=many and k < len(names), label=f"Strength of {names[k]}" if k < len(names) else "")
        for k in range(MOST)
    ]


def talks(place: Place, names: Sequence[str]) -> bool:
    """Whether the adapters are talked to."""
    try:
        return kind_of(place, names) == "conversation"
    except InputError:
        return False


def kind_of(place: Place, names: Sequence[str]) -> str:
    """What the domain of the adapters asks for: "prompts", "pictures" or "conversation".

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
