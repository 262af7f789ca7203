"""`graft preview`, `graft predict` and `graft eval`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.studio.commands import Answer, add_runs, add_set, command, find_adapter, settings, table

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.studio.runs import Run


def add(commands: Any) -> None:
    """Add the commands."""
    parser = command(commands, "preview", preview, "draw pictures with an adapter, and without it beside them")
    parser.add_argument("names", metavar="RUN_OR_ADAPTER", nargs="+", help="a run, or an adapter; several act at once")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="strength of each (default: 1, as trained)"
    )
    parser.add_argument(
        "--strengths", type=float, nargs="+", metavar="S", help="of all together: pictures at each, side by side"
    )
    _common(parser, "steps=25", named=False)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help='with "{token}" for the concept, "{token2}" for the second\'s; repeatable',
    )
    parser.add_argument("--seed", action="append", type=int, metavar="N", help="one picture each; repeatable")
    parser.add_argument("--out", default="preview", metavar="DIR", help="folder of the pictures (default: preview)")
    parser = command(commands, "predict", predict, "tell what pictures show, with an adapter that tells them apart")
    _common(parser, "top=3")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="picture files, or folders of them")
    parser = command(commands, "eval", evaluate, "measure an adapter beside its base")
    help = "a run, or the folder or file of an adapter; of several, such as runs of other seeds, mean and spread too"
    parser.add_argument("names", metavar="RUN_OR_ADAPTER", nargs="+", help=help)
    _common(parser, "seeds=4", named=False)
    parser.add_argument("--data", metavar="DIR", help="pictures to compare with or to tell (default: those of the run)")
    parser.add_argument("--out", metavar="DIR", help="folder for a report with pictures, where the domain draws some")


def _common(parser: argparse.ArgumentParser, example: str, named: bool = True) -> None:
    if named:
        parser.add_argument("name", metavar="RUN_OR_ADAPTER", help="a run, or the folder or file of an adapter")
    parser.add_argument("--base", metavar="NAME", help="instead of the base that the adapter names")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: the accelerator if there is one)")
    parser.add_argument(
        "--attention", default="auto", metavar="NAME", help="auto, sdpa or xformers, as in a job (default: auto)"
    )
    add_set(parser, example)
    add_runs(parser)


def load_base_of(adapter: Adapter, name: str | None, device: str | None = None, attention: str = "auto") -> Any:
    """Return the base of an adapter, or the one that was named instead.

    Raises:
        InputError: neither is known.
    """
    from graft.studio.errors import InputError
    from graft.studio.registry import load_base

    name = name or adapter.card.base
    if not name:
        raise InputError("the adapter", "its file does not name its base", "Give --base NAME")
    return load_base(name, device, domain=adapter.card.domain, attention=attention)


def preview(args: argparse.Namespace) -> Answer:
    """Pictures with and without, from the saved files."""
    from graft.studio.config import from_dict
    from graft.studio.errors import InputError

    found = [find_adapter(name, args.runs) for name in args.names]
    adapter, run = found[0]
    base = load_base_of(adapter, args.base, args.device, args.attention)
    domain = _domain(base)
    if not hasattr(domain, "preview"):
        raise InputError("graft preview", f"an adapter of {base.domain} draws no pictures", "Use graft predict")
    told = {name: getattr(args, name) for name in ("weights", "strengths") if getattr(args, name)}
    config = from_dict(domain.PreviewConfig, {**settings(args.set), **told}, "preview")
    words = {f"{{token{i or ''}}}": each.card.trigger or "" for i, (each, _) in enumerate(found, start=1)}
    words["{token}"] = word = adapter.card.trigger or ""
    prompts = args.prompt or _prompts(run, word)
    for token, spoken in words.items():
        prompts = [prompt.replace(token, spoken) for prompt in prompts]
    several = [each for each, _ in found]
    if len(several) > 1 and not hasattr(config, "weights"):
        raise InputError(" ".join(args.names), f"{base.domain} shows one adapter at a time", "Give one")
    adapters = several if len(several) > 1 else adapter
    files = domain.preview(base, adapters, prompts, args.seed or [0, 1, 2, 3], Path(args.out), config)
    document = {"files": [str(path) for path in files], "prompts": prompts}
    return Answer(document, f"{files[0]}  and {len(files) - 1} more")


def _prompts(run: Run | None, word: str) -> list[str]:
    sampled = list(run.job.sample.prompts) if run is not None else []
    return sampled or (["a photo of {token}", "{token} on a blue background"] if word else ["", "on a blue background"])


def predict(args: argparse.Namespace) -> Answer:
    """What pictures show."""
    from inspect import signature

    from graft.studio.config import suggest
    from graft.studio.errors import InputError

    adapter, _ = find_adapter(args.name, args.runs)
    base = load_base_of(adapter, args.base, args.device, args.attention)
    domain = _domain(base)
    if not hasattr(domain, "predict"):
        raise InputError("graft predict", f"an adapter of {base.domain} tells nothing apart", "Use graft preview")
    chosen, known = settings(args.set), list(signature(domain.predict).parameters)[3:]
    for name in chosen:
        if name not in known:
            raise InputError(f"--set {name}", "no such setting", suggest(name, known))
    rows = domain.predict(base, adapter, args.pictures, **chosen)
    return Answer(rows, table(rows, ("picture", "label", "probability")))


def evaluate(args: argparse.Namespace) -> Answer:
    """Figures with and without; of several runs those of each, with their mean and spread."""
    from graft.studio.errors import InputError

    names = list(dict.fromkeys(args.names))
    if len(names) == 1:
        return _evaluated(args, names[0])
    if args.out:
        raise InputError("--out", f"a report is of one run, not of {len(names)}", "Give one, or leave it out")
    documents: dict[str, Any] = {name: _evaluated(args, name).document for name in names}
    sides = {side: [document[side] for document in documents.values()] for side in ("base", "adapter")}
    over = {
        kind: {side: each(rows) for side, rows in sides.items()}
        for kind, each in (("mean", _mean), ("spread", _spread))
    }
    rows = [{"": name, **document["adapter"]} for name, document in documents.items()]
    rows += [{"": f"{kind}, {side}", **over[kind][side]} for side in ("adapter", "base") for kind in over]
    return Answer({"runs": documents, **over}, table(rows, tuple(dict.fromkeys(key for row in rows for key in row))))


def _numbers(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """The figures that every row has as a number."""
    shared = [key for key in rows[0] if all(isinstance(row.get(key), int | float) for row in rows)]
    return {key: [float(row[key]) for row in rows] for key in shared}


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {key: sum(values) / len(values) for key, values in _numbers(rows).items()}


def _spread(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Standard deviation, of a sample."""
    from statistics import stdev

    return {key: stdev(values) for key, values in _numbers(rows).items()}


def _evaluated(args: argparse.Namespace, name: str) -> Answer:
    """Figures of one."""
    from graft.studio.config import from_dict

    adapter, run = find_adapter(name, args.runs)
    base = load_base_of(adapter, args.base, args.device, args.attention)
    domain = _domain(base)
    config = from_dict(
        domain.EvaluationConfig, {**_measured_on(args, name, adapter, run, domain), **settings(args.set)}, "eval"
    )
    drawn = _drawn(args, domain)
    figures = {"base": domain.evaluate(base, None, config), "adapter": domain.evaluate(base, adapter, config, **drawn)}
    rows = [{"": side, **values} for side, values in figures.items()]
    text = table(rows, tuple(dict.fromkeys(key for row in rows for key in row)))
    if run is not None:
        before = sum(event["event"] == "evaluated" for event in run.events())
        run.write_event("evaluated", settings=_plain(config), figures=figures["adapter"])
        text += f"\nThis run has been evaluated {before} times before." if before else ""
    if drawn:
        text += f"\nReport: {_report(args, name, run, rows)}"
    return Answer(figures, text)


def _measured_on(args: argparse.Namespace, name: str, adapter: Adapter, run: Run | None, domain: Any) -> dict[str, Any]:
    """The pictures: those that were named, or those of the run."""
    from graft.studio.errors import InputError

    if run is None and not args.data:
        raise InputError(name, "an adapter alone does not know its pictures", "Give --data DIR")
    if hasattr(domain, "evaluation_settings"):
        found: dict[str, Any] = domain.evaluation_settings(adapter, run, args.data)
        return found
    own, told = dict(run.job.eval) if run is not None else {}, {}
    if run is not None and hasattr(domain, "run_settings"):
        told = domain.run_settings(run, args.data)
    else:
        told = {"path": args.data or str(run.job.data["path"] if run is not None else "")}
    return {**own, **told} if args.data else {**told, **own}


def _drawn(args: argparse.Namespace, domain: Any) -> dict[str, Path]:
    from inspect import signature

    from graft.studio.errors import InputError

    if args.out and "out" not in signature(domain.evaluate).parameters:
        raise InputError("--out", "this domain draws no pictures of its figures", "Use graft preview")
    return {"out": Path(args.out)} if args.out else {}


def _report(args: argparse.Namespace, name: str, run: Run | None, rows: Sequence[dict[str, Any]]) -> Path:
    """A page of the figures and of every picture that was drawn."""
    from graft.app.report import write_report

    out = Path(args.out)
    pictures = [(path.stem, path) for path in sorted(out.glob("*.png"))]
    return write_report([run] if run else [], out / "report.html", f"Evaluation of {name}", pictures,
                        [("Figures", rows)])  # fmt: skip


def _plain(config: Any) -> dict[str, Any]:
    from graft.studio.config import to_dict

    return to_dict(config)


def _domain(base: Any) -> Any:
    from graft.studio import registry

    return registry.domain(base.domain)
