"""The part of Preview for domains that hold a conversation: a question, and answers of base and adapters side by side.

Each question asks the whole conversation anew, as `graft chat` does: equal pictures, adapters and seed tell the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from graft.app import cells
from graft.app.handlers import QUIET, note, told
from graft.app.place import Place
from graft.studio.errors import InputError

TURNS = 8
"""Questions of a conversation, as many as `graft.studio.shown.Asked` takes."""
LONGEST = 2000
"""Characters of a question."""


def panel(place: Place, chosen: gr.Dropdown, out: gr.HTML) -> gr.Column:
    """Draw the fields, hidden; return what to show for such a domain.

    Args:
        place: of the studio.
        chosen: the adapters.
        out: where the conversation stands.
    """
    # What was asked stands in the page: a server that was started again knows no sessions.
    asked = gr.Textbox("[]", visible="hidden")
    with gr.Column(visible=False) as column:
        drop = gr.File(label="Pictures to talk about", file_count="multiple", file_types=["image"], elem_id="seen")
        question = gr.Textbox("", label="Question", max_length=LONGEST, elem_id="question")
        with gr.Row():
            temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature", info="0 takes the likeliest words.")
            seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="Of what is drawn.", min_width=90)
        with gr.Row():
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
            again = gr.Button("Start over", elem_id="again")

    def answer(names: list[str], files: list[str] | None, question: str, asked: str, *how: float) -> list[Any]:
        if not names:
            raise InputError("Adapters", "none is chosen", "Choose one")
        questions = [*before(asked), question.strip()[:LONGEST]]
        if not questions[-1]:
            raise InputError("Question", "it is empty", "Ask something")
        if len(questions) > TURNS:
            raise InputError("Question", f"the conversation has {TURNS} already", "Start over")
        return ["", json.dumps(questions), conversation(place, names, files, questions, *how)]

    wanted = [chosen, drop, question, asked, temperature, seed]
    for event in (ask.click, question.submit):
        event(told(answer), wanted, [question, asked, out], concurrency_id="models", concurrency_limit=1,
              show_progress_on=out, api_visibility="private")  # fmt: skip
    again.click(lambda: ["", "[]", note("Ask something.")], None, [question, asked, out], **QUIET)
    return column


def before(asked: str) -> list[str]:
    """The questions so far, as the page sends them; what is no list of words is none."""
    try:
        found = json.loads(asked)
    except ValueError:
        return []
    return [str(each)[:LONGEST] for each in found] if isinstance(found, list) else []


def conversation(
    place: Place, names: list[str], files: list[str] | None, questions: list[str], temperature: float, seed: float
) -> str:
    """The pictures, and a row for each question with every side's answer.

    Raises:
        InputError: no such adapters, or files that are no pictures.
    """
    pictures = cells.safe_pictures(place, files)
    asked = {
        "prompts": questions, "pictures": [str(path) for path in pictures], "seed": int(seed or 0),
        "settings": {"temperature": float(temperature)},
    }  # fmt: skip
    found = place.models.ask("show", adapters=names, asked=asked, out=str(cells.new_folder(place)))
    tiles = "".join(cells.drawn(place, str(path), "") for path in pictures)
    return f'<div class="graft" id="talk"><div class="grid">{tiles}</div>{turns(found)}</div>'


def turns(found: Sequence[Mapping[str, Any]]) -> str:
    """Each question, and below it what every side answers, side by side."""
    rows = dict.fromkeys(cell["row"] for cell in found)
    return "".join(
        f'<p class="asked">{escape(row)}</p><div class="answers">{"".join(answered(found, row))}</div>' for row in rows
    )


def answered(found: Sequence[Mapping[str, Any]], row: str) -> Iterator[str]:
    """The answers to a question."""
    for cell in found:
        if cell["row"] == row:
            words = escape(cell["text"]) or '<span class="soft">(nothing)</span>'
            yield f'<div><small>{escape(cell["column"])}</small><p class="said">{words}</p></div>'
