"""`graft demo`: the main job on the embedded models, from five pictures to a page with the result.

    graft demo --out demo

A sprite that no embedded model has ever seen is drawn on five backgrounds. Textual Inversion and LoRA learn it from
these five pictures, both adapters are measured against pictures that were not trained on, and what the base drew before
is put beside what it draws now. Everything below `out` is what a user's own project would hold: photos, job files,
runs, adapters.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.studio.errors import InputError

if TYPE_CHECKING:
    from graft.studio.runs import Run

CONCEPT = "hedgehog"
METHODS = ("textual_inversion", "lora")
PROMPTS = ("a picture of {}", "{} on a blue background", "{} on a yellow background")
SEEDS = (0, 1, 2)


def run(out: str | Path = "demo", concept: str = CONCEPT, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the demo and return its figures and files.

    Args:
        out: folder to make; one from an earlier demo is replaced, any other is refused.
        concept: name of a new sprite.
        overrides: for both jobs, such as "train.steps=20".

    Raises:
        InputError: no such sprite, or `out` holds something else.
    """
    from graft.studio.job import Job
    from graft.studio.training import train

    out = Path(out)
    _make_room(out)
    _say(f"1/4  five pictures of {concept!r}, which no embedded model has seen")
    write_photos(out / "photos", out / "held_out", concept)
    began = time.perf_counter()
    runs: dict[str, Run] = {}
    for number, method in enumerate(METHODS, start=2):
        _say(f"{number}/4  {method} learns it")
        job = out / f"{method}.toml"
        job.write_text(job_text(method), encoding="utf-8")
        runs[method] = train(Job.load(job, overrides), out / "runs" / method)
    seconds = time.perf_counter() - began
    _say("4/4  before and after")
    figures = compare(out, concept, runs)
    figures["training_seconds"] = round(seconds, 1)
    report = write_page(out, concept, runs, figures)
    return {"report": str(report), "grid": str(out / "before_after.png"), "figures": figures}


def job_text(method: str) -> str:
    """Return the job file of one method, as a user would write it."""
    word = 'token = "<sprout>"' if method == "textual_inversion" else 'trigger = "sprout"'
    return f"""base = "pocket-sd"
domain = "diffusion"

[method]
name = "{method}"
{word}

[data]
path = "photos"
"""


def write_photos(photos: Path, held_out: Path, concept: str) -> None:
    """Write five pictures with captions to learn from, and others to compare with: other grounds, sizes and places."""
    from graft.diffusion.bench.pictures import held_out_pictures, write_pictures
    from graft.studio.pocket.atlas import Atlas

    sprite = Atlas.load().index(concept)
    write_pictures(photos, sprite)
    held_out.mkdir(parents=True)
    for k, picture in enumerate(held_out_pictures(sprite)):
        picture.save(held_out / f"{k:02d}.png")


def compare(out: Path, concept: str, runs: dict[str, Run]) -> dict[str, Any]:
    """Measure base and adapters on held-out pictures and draw the before/after grid; returns the figures."""
    from graft.studio import registry
    from graft.studio.runs import open_run

    diffusion = registry.domain("diffusion")
    base = registry.load_base("pocket-sd", device="cpu")
    settings = diffusion.EvaluationConfig(path=str(out / "held_out"), class_word=concept)
    rows = {"base": diffusion.evaluate(base, None, settings)}
    blocks = {"before": draw(base, concept)}
    for method, trained in runs.items():
        adapter = open_run(trained.folder).adapter()
        rows[method] = diffusion.evaluate(base, adapter, settings)
        with adapter.attached(base):
            blocks[method.replace("_", " ")] = draw(base, adapter.card.trigger or concept)
    from graft.diffusion.previews import grid, save_png

    prompts = [prompt.format("...") for prompt in PROMPTS]
    save_png(out / "before_after.png", grid(blocks, prompts, SEEDS))
    # CLIP's text tower has never heard of a new concept: what it says of the words means nothing here
    kept = ("image_similarity", "background_alignment")
    return {"concept": concept, "measures": {name: {key: row[key] for key in kept} for name, row in rows.items()}}


def draw(base: Any, word: str) -> Any:
    """Draw the demo's prompts with one word for the concept."""
    from graft.diffusion.previews import PreviewConfig
    from graft.diffusion.previews import draw as draw_prompts

    return draw_prompts(base, [prompt.format(word) for prompt in PROMPTS], SEEDS, PreviewConfig())


def write_page(out: Path, concept: str, runs: dict[str, Run], figures: dict[str, Any]) -> Path:
    """Write the one-page report and the figures."""
    from graft.app.report import write_report

    table = [{"": name, **measures} for name, measures in figures["measures"].items()]
    pictures = [("Before and after: one column per seed", out / "before_after.png")]
    pictures += [(f"trained on {path.name}", path) for path in sorted((out / "photos").glob("*.png"))]
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    caption = "Compared with pictures that were not trained on"
    title = f"Graft Studio demo: {concept}"
    return write_report(list(runs.values()), out / "report.html", title, pictures, [(caption, table)])


def _make_room(out: Path) -> None:
    """Remove an earlier demo; refuse any other folder."""
    if not out.exists():
        out.mkdir(parents=True)
    elif out.is_dir() and ((out / "textual_inversion.toml").exists() or not any(out.iterdir())):
        shutil.rmtree(out)
        out.mkdir()
    else:
        raise InputError(str(out), "it exists and is no earlier demo", "Name a new folder with --out")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
