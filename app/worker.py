"""The process that holds the models: `python -m graft.app.worker RUNS`. One JSON line in, one out, to the end.

By the Python API it does what the pages ask for: starts jobs, runs commands of `graft`, shows what adapters do.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import tomllib
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from graft.studio.errors import InputError
from graft.studio.pictures import find_pictures
from graft.studio.runs import Run

COMMANDS = {("adapters", "inspect"), ("adapters", "verify"), ("adapters", "convert"), ("adapters", "merge")}
"""Commands that a page may run here."""
OF_PICTURES = ("unreadable", "duplicate", "near duplicate")
"""Findings of the doctor that hold whatever is learnt from the pictures."""


def start(runs: Path, job: Mapping[str, Any]) -> str:
    """Start a training and return the id of its run."""
    from graft.app.launch import submit

    return submit(job, runs).id


def doctor(runs: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Look for what is wrong with a job's pictures, as `graft data doctor` does.

    A base of a hub is not loaded for it, and of a domain without a doctor of its own the pictures alone are looked at.
    """
    from graft.studio.config import from_dict
    from graft.studio.job import Job
    from graft.studio.pictures import find_pictures
    from graft.studio.registry import find

    loaded = Job.load(job)
    if loaded.domain == "diffusion" and loaded.base.startswith("pocket-"):
        whole: dict[str, Any] = find("graft.diffusion.doctor:examine_job", "diffusion")(loaded).document()
        return whole
    config = find("graft.diffusion:DataConfig", "diffusion")
    path = Path(loaded.data["path"])  # of a table the pictures lie beside it
    own = loaded.data if loaded.domain == "diffusion" else {"path": str(path if path.is_dir() else path.parent)}
    if loaded.domain != "diffusion" and not find_pictures(Path(own["path"])):
        return {"findings": []}
    report = find("graft.diffusion.doctor:examine", "diffusion")(from_dict(config, own, "data")).document()
    if loaded.domain != "diffusion":
        report["findings"] = [each for each in report["findings"] if each["kind"] in OF_PICTURES]
    return dict(report)


def demo(runs: Path, data: str) -> str:
    """Start the training of the demo, on five pictures of a sprite that no embedded model has seen."""
    from graft.app.launch import submit
    from graft.studio.demo import CONCEPT, job_text, write_photos

    photos = Path(data) / f"demo-{CONCEPT}"
    if not photos.exists():
        write_photos(photos, runs / ".studio" / "held_out" / CONCEPT, CONCEPT)
    job = tomllib.loads(job_text("lora")) | {"name": "demo", "data": {"path": str(photos)}, "sample": {"every": 50}}
    return submit(job, runs).id


def command(runs: Path, argv: list[str]) -> Any:
    """Run a command of `graft` and return its document.

    Raises:
        InputError: as the command.
    """
    from graft.studio.cli import build_parser

    if tuple(argv[:2]) not in COMMANDS:
        raise InputError(" ".join(argv[:2]), "no page runs this command", "Run it in a terminal")
    args: argparse.Namespace = build_parser().parse_args([*argv, "--runs", str(runs)])
    with redirect_stdout(sys.stderr):
        return args.run(args).document


def rows(runs: Path, job: Mapping[str, Any], count: int) -> str:
    """Return the first rows of a job's data as `graft data preview` shows them, as HTML.

    Raises:
        InputError: anything wrong with job, base or data, or a domain without rows of tokens.
    """
    from graft.studio import registry
    from graft.studio.job import Job

    loaded = Job.load(job)
    domain = registry.domain(loaded.domain)
    if not hasattr(domain, "show_rows"):
        raise InputError(f"domain {loaded.domain!r}", "it has no rows of tokens", "Start the training")
    body: str = domain.show_rows(loaded, count).body
    return body


def known_of(run: Run) -> list[str]:
    """The pictures in the folder of a run's data, if it has one that is still there."""
    path = Path(str(run.job.data.get("path") or "/dev/null"))
    return [str(file) for file in find_pictures(path)] if path.is_dir() else []


class Shower:
    """Shows what adapters do; keeps the last base loaded."""

    def __init__(self) -> None:
        self.base: Any = None

    def __call__(self, runs: Path, adapters: list[str], asked: Mapping[str, Any], out: str) -> list[dict[str, Any]]:
        """Return what is shown, as `graft.studio.shown.Shown` has it.

        Args:
            runs: folder of the runs.
            adapters: run ids; all of one base.
            asked: fields of `graft.studio.shown.Asked`.
            out: folder for pictures.
        """
        from graft.studio import registry
        from graft.studio.config import from_dict
        from graft.studio.runs import find_run
        from graft.studio.shown import Asked, Shown

        found = [find_run(name, runs) for name in adapters]
        loaded = [run.adapter() for run in found]
        bases = {adapter.card.base for adapter in loaded}
        if len(bases) != 1:
            raise InputError(
                ", ".join(sorted(bases)), "the adapters are of different bases", "Choose those of one base"
            )
        (name,) = bases
        if self.base is None or self.base.name != name:
            self.base = None  # the old one goes before the new one comes
            self.base = registry.load_base(name, domain=loaded[0].card.domain)
        domain = registry.domain(loaded[0].card.domain)
        if domain.ASKS == "pictures":
            asked = {**asked, "known": known_of(found[0])}
        shown: list[Shown] = domain.shown(self.base, loaded, from_dict(Asked, asked, "preview"), Path(out))
        return [each.plain() for each in shown]


def main() -> None:
    """Answer until the input ends."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    runs = Path(sys.argv[1])
    table: dict[str, Callable[..., Any]] = {
        "start": start,
        "demo": demo,
        "doctor": doctor,
        "command": command,
        "rows": rows,
        "show": Shower(),
    }
    for line in io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8"):
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"answer": table[request.pop("what")](runs, **request)}
        except InputError as error:
            answer = {"error": [error.given, error.reason, error.remedy]}
        except Exception as error:
            logging.exception("a request failed")
            answer = {"error": str(error) or type(error).__name__}
        answers.write(json.dumps(answer, default=str) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
