"""`graft adapters`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.studio.commands import Answer, add_runs, command, find_adapter, group, table
from graft.studio.commands.preview import load_base_of


def add(commands: Any) -> None:
    """Add the commands."""
    inner = group(commands, "adapters", "list, inspect, convert, verify, resize, extract and merge adapters")
    add_runs(command(inner, "list", list_, "list the adapters of the runs"))
    for name, run, help in (
        ("inspect", inspect, "show what an adapter is and what it was made from"),
        ("convert", convert, "write an adapter for another library"),
        ("verify", verify, "check that an adapter is whole, fits its base, and does the same in the library it is for"),
        ("resize", resize, "cut a LoRA to a smaller rank and tell what is lost"),
        ("merge", merge, "write a copy of the base with the adapter in its weights; of several, one adapter for all"),
    ):
        parser = command(inner, name, run, help)
        many: dict[str, Any] = {"nargs": "+"} if name == "merge" else {}
        told = "a run, or the folder or file of an adapter"
        parser.add_argument("name", metavar="RUN_OR_ADAPTER", help=told, **many)
        if name in ("convert", "resize", "merge"):
            parser.add_argument("out", metavar="DIR", help="folder to write")
        if name in ("convert", "resize"):
            formats = (
                "diffusers, peft, kohya, loralib, torchtune, timm, transformers, merged, lora, lora-RANK or native"
            )
            default = "diffusers" if name == "convert" else "native"
            parser.add_argument("--to", default=default, metavar="FORMAT", help=f"{formats} (default: {default})")
        if name == "convert":
            head = "width of an attention head of the base, from or to torchtune, whose files do not tell it"
            parser.add_argument("--head-dim", type=int, metavar="N", help=head)
        if name in ("verify", "merge"):
            parser.add_argument("--base", metavar="NAME", help="instead of the base that the adapter names")
        if name == "merge":
            captions = "of several of custom_diffusion: a text file with captions, one a line, to be drawn as before"
            parser.add_argument("--captions", metavar="FILE", help=captions)
            parser.add_argument("--weights", metavar="W,W", help="of several LoRAs: what each counts (default: 1 each)")
        if name in ("resize", "merge"):
            _add_cut(parser, "" if name == "resize" else "of several LoRAs: ")
        add_runs(parser)
    parser = command(inner, "extract", extract, "write the difference of two bases as a LoRA and tell what is lost")
    parser.add_argument("tuned", metavar="TUNED", help="the base with the change, such as the folder of a checkpoint")
    parser.add_argument("base", metavar="BASE", help="the base without it, which the LoRA will be for")
    parser.add_argument("out", metavar="DIR", help="folder to write")
    _add_cut(parser, "")
    parser.add_argument("--targets", default="all", metavar="SITES", help="as in a job's method (default: all)")


def _add_cut(parser: argparse.ArgumentParser, when: str) -> None:
    parser.add_argument("--rank", type=int, metavar="R", help=f"{when}largest rank of a module")
    kept = f"{when}share of the squared singular values that each module keeps at least, such as 0.9"
    parser.add_argument("--keep", type=float, metavar="SHARE", help=kept)


def list_(args: argparse.Namespace) -> Answer:
    """The results of finished runs."""
    from graft.studio.adapter import Adapter
    from graft.studio.runs import list_runs

    rows = []
    for run in list_runs(args.runs):
        if (run.folder / "result").is_dir():
            card = Adapter.load(run.folder / "result").card
            rows.append(
                {"run": run.id, "method": card.method, "base": card.base, "trigger": card.trigger, **_loss(card)}
            )
    empty = f"no adapters in {args.runs}"
    return Answer(rows, table(rows, ("run", "method", "base", "trigger", "loss")) if rows else empty)


def _loss(card: Any) -> dict[str, Any]:
    return {"loss": card.metrics.get("loss")}


def inspect(args: argparse.Namespace) -> Answer:
    """Card and tensors."""
    adapter, _ = find_adapter(args.name, args.runs)
    tensors = [
        {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in adapter.tensors.items()
    ]
    parameters = sum(tensor.numel() for tensor in adapter.tensors.values())
    document = {**dataclasses.asdict(adapter.card), "parameters": parameters, "tensors": tensors}
    provenance = adapter.card.details.get("provenance", {})
    told = document | {"details": {k: v for k, v in adapter.card.details.items() if k != "provenance"}} | provenance
    facts = [
        {"": key, " ": f"{len(value)} sites" if key == "sites" else value}
        for key, value in told.items()
        if key != "tensors"
    ]
    shown = table(tensors[:20], ("name", "shape", "dtype"))
    more = f"\n... and {len(tensors) - 20} more" if len(tensors) > 20 else ""
    return Answer(document, f"{table(facts, ('', ' '))}\n\n{shown}{more}")


def convert(args: argparse.Namespace) -> Answer:
    """The adapter in another format."""
    adapter, _ = find_adapter(args.name, args.runs, args.head_dim)
    if args.head_dim is not None:
        told = {**adapter.card.details, "head_dim": args.head_dim}
        adapter = dataclasses.replace(adapter, card=dataclasses.replace(adapter.card, details=told))
    files = [str(path) for path in adapter.export(args.out, args.to)]
    return Answer({"format": args.to, "files": files}, "\n".join(files))


def verify(args: argparse.Namespace) -> Answer:
    """Whole, finite, attached to its base without leaving a trace, and the same in the library that it is for."""
    from graft.studio import registry
    from graft.studio.adapter import base_hash
    from graft.studio.errors import FormatError

    adapter, run = find_adapter(args.name, args.runs)
    broken = [name for name, tensor in adapter.tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise FormatError(args.name, f"{', '.join(broken[:5])} are not finite", "Train it again")
    base = load_base_of(adapter, args.base)
    before = base_hash(base.modules)
    with adapter.attached(base):
        pass
    domain = registry.domain(base.domain)
    source = Path(args.name) if run is None else None
    found = domain.compare(base, adapter, source)
    compared, reason = (None, found) if isinstance(found, str) else (found, None)
    document = {
        "tensors": len(adapter.tensors),
        "base": base.name,
        "base_hash": base.hash,
        "attaches": True,
        "detaches": base_hash(base.modules) == before,
        "compared": compared,
        "uncompared": reason,
    }
    right = document["detaches"] and (compared is None or compared["same"])
    likeness = f"not compared with another library: {reason}" if compared is None else _likeness(compared)
    return Answer(document, f"{args.name}: whole, fits {base.name} ({base.hash[:16]})\n{likeness}", 0 if right else 1)


def _likeness(compared: dict[str, Any]) -> str:
    """What another library makes of the adapter, in words."""
    if "refused" in compared:
        return f"{compared['library']} does not load {compared['file']}: {compared['refused']}"
    verdict = "the same" if compared["same"] else "NOT the same"
    return (
        f"{compared['library']} makes {verdict} of {compared['file']}: error {compared['error']:.2g} of the adapter's "
        f"change, which is {compared['change']:.2g} of the outputs"
    )


def resize(args: argparse.Namespace) -> Answer:
    """The adapter with a smaller rank."""
    from graft.studio import workbench

    cut = workbench.Cut(args.rank, args.keep)
    adapter, _ = find_adapter(args.name, args.runs)
    return _written(workbench.resize(adapter, cut), args.out, args.to)


def extract(args: argparse.Namespace) -> Answer:
    """What makes one base of another, as a LoRA."""
    from graft.studio import workbench
    from graft.studio.disk import require_empty
    from graft.studio.registry import load_base

    cut = workbench.Cut(args.rank, args.keep)
    require_empty(Path(args.out))
    base, tuned = load_base(args.base, "cpu"), load_base(args.tuned, "cpu")
    return _written(workbench.extract(tuned, base, cut, args.targets), args.out, "native")


def _written(reworked: Any, out: str, format: str) -> Answer:
    """Write what the workbench made, whole or not at all, and tell what it lost."""
    from graft.studio.disk import new_folder

    with new_folder(Path(out)) as draft:
        files = [path.relative_to(draft) for path in reworked.adapter.export(draft, format)]
    folder = Path(out).absolute()
    rows = [{"module": loss.module, "rank": loss.rank, "error": loss.error} for loss in reworked.losses]
    elsewhere = {"tensors": reworked.elsewhere, "norm": reworked.elsewhere_size} if reworked.elsewhere else None
    document = {"folder": str(folder), "files": [str(folder / file) for file in files], "error": reworked.error,
                "modules": rows, "elsewhere": elsewhere}  # fmt: skip
    worst = sorted(rows, key=lambda row: -row["error"])
    told = [table(worst[:20], ("module", "rank", "error"))]
    if len(rows) > 20:
        told.append(f"... and {len(rows) - 20} more with smaller errors")
    if elsewhere:
        told.append(
            f"left out: {len(reworked.elsewhere)} tensors that no factor can hold, such as {reworked.elsewhere[0]}"
        )
    ranks = [loss.rank for loss in reworked.losses]
    told.append(
        f"{len(ranks)} modules of ranks {min(ranks)} to {max(ranks)}: {100 * reworked.error:.4g} % of the change is "
        f"left out; written to {folder}"
    )
    return Answer(document, "\n".join(told))


def merge(args: argparse.Namespace) -> Answer:
    """The base with the adapter in its weights, or several adapters in one."""
    from graft.studio import registry
    from graft.studio.errors import InputError

    if len(args.name) > 1:
        return _combined(args)
    _refuse(args, ("weights", "rank", "keep", "captions"), "these are for several adapters", "Name them one by one")
    (name,) = args.name
    adapter, _ = find_adapter(name, args.runs)
    base = load_base_of(adapter, args.base)
    domain = registry.domain(base.domain)
    with adapter.attached(base) as handle:
        if not hasattr(handle, "merge") or not hasattr(domain, "save_base"):
            reason = f"what {adapter.card.method} learns is not a change of the base's weights"
            raise InputError(name, reason, "Use `graft adapters convert`")
        if hasattr(domain, "save_merged"):
            off = domain.save_merged(base, handle, Path(args.out))
            text = f"merged base written to {args.out}; its logits are within {off:.2g} of the attached adapter's"
            return Answer({"folder": args.out, "difference": off}, text)
        handle.merge()
        folder = domain.save_base(base, Path(args.out))
    return Answer({"folder": str(folder)}, f"merged base written to {folder}")


def _combined(args: argparse.Namespace) -> Answer:
    """One adapter that does what several do."""
    from graft.studio import registry, workbench
    from graft.studio.disk import require_empty
    from graft.studio.errors import InputError

    require_empty(Path(args.out))
    adapters = [find_adapter(name, args.runs)[0] for name in args.name]
    card = adapters[0].card
    method = registry.method_class(card.domain, card.method) if card.domain else None
    if not hasattr(method, "combine"):
        _refuse(args, ("captions",), "these are for custom_diffusion", "Leave it out")
        weights = _weights(args.weights) if args.weights else [1.0] * len(adapters)
        cut = workbench.Cut(args.rank, args.keep) if args.rank or args.keep is not None else None
        return _written(workbench.add(adapters, weights, cut), args.out, "native")
    if {adapter.card.method for adapter in adapters} != {card.method}:
        given = ", ".join(dict.fromkeys(adapter.card.method for adapter in adapters))
        raise InputError(given, "these cannot be joined", "Several adapters of custom_diffusion can, or several LoRAs")
    _refuse(args, ("weights", "rank", "keep"), "these are for LoRAs", "Leave it out")
    lines = _lines(args.captions) if args.captions else ()
    combined = method.combine(adapters, load_base_of(adapters[0], args.base), lines)  # type: ignore[union-attr]
    folder = combined.save(args.out)
    told = f"one adapter written to {folder}; it is called by: {combined.card.trigger}"
    return Answer({"folder": str(folder), "trigger": combined.card.trigger}, told)


def _refuse(args: argparse.Namespace, names: Sequence[str], reason: str, remedy: str) -> None:
    """Raises InputError for options that would be left aside."""
    from graft.studio.errors import InputError

    for name in names:
        if getattr(args, name) is not None:
            raise InputError(f"--{name}", reason, remedy)


def _weights(text: str) -> list[float]:
    """Numbers between commas.

    Raises:
        InputError: something else.
    """
    from graft.studio.errors import InputError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--weights {text}", "these are not numbers between commas", "Write --weights 0.7,0.3"
        ) from None


def _lines(path: str) -> list[str]:
    """Lines of a text file that hold something.

    Raises:
        InputError: no such file, or none does.
    """
    from graft.studio.errors import InputError

    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read: {error}", "Give a text file with one caption a line") from None
    if not any(lines):
        raise InputError(path, "it is empty", "Write one caption a line, a few hundred")
    return [line for line in lines if line]
