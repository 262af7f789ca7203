"""Other places for a training's figures, beside metrics.jsonl, which is always written: `train.track`.

`tensorboard` writes event files into the run's folder (`tensorboard --logdir runs`); `trackio` keeps its own table on
this machine; `wandb` sends the figures to its service, unless WANDB_MODE says offline. Each is imported only when a job
asks for it, and gets figures and the job's settings, never pictures, captions or secrets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from graft.studio.config import to_dict
from graft.studio.errors import InputError
from graft.studio.runs.folder import Run

Log = Callable[[int, Mapping[str, float]], None]
MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
"""Name -> what is imported for it."""


def check(names: Sequence[str]) -> None:
    """Import what a job asks for.

    Raises:
        InputError: it is not installed.
    """
    for name in names:
        try:
            import_module(MODULES[name])
        except ImportError as error:
            remedy = f"Run: pip install {name}, or leave it out: metrics.jsonl is always written"
            raise InputError(f'train.track = ["{name}"]', f"the library {name!r} is not installed", remedy) from error


@contextmanager
def sinks(run: Run, step: int) -> Iterator[Log]:
    """Yield what takes the figures of a run to every place that its job names.

    Args:
        run: whose figures they are.
        step: where this attempt begins; what an earlier one wrote after it, was done again.
    """
    with ExitStack() as stack:
        logs = [stack.enter_context(_OPEN[name](run, step)) for name in run.job.train.track]

        def log(at: int, figures: Mapping[str, float]) -> None:
            for each in logs:
                each(at, figures)

        yield log


@contextmanager
def _tensorboard(run: Run, step: int) -> Iterator[Log]:
    writer_class = import_module(MODULES["tensorboard"]).SummaryWriter
    writer = writer_class(str(run.folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(at: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, at)
        writer.flush()

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _wandb_like(name: str, run: Run, **settings: Any) -> Iterator[Log]:
    """Trackio has the interface of wandb."""
    library = import_module(MODULES[name])
    job = to_dict(run.job)
    config = {key: job[key] for key in ("base", "domain", "method", "train")}
    live = library.init(project="graft", name=run.id, config=config, resume="allow", **settings)
    try:
        yield lambda at, figures: live.log(dict(figures), step=at)
    finally:
        live.finish()


def _trackio(run: Run, step: int) -> Any:
    return _wandb_like("trackio", run)


def _wandb(run: Run, step: int) -> Any:
    folder: Path = run.folder
    return _wandb_like("wandb", run, id=run.id, dir=str(folder))


_OPEN: dict[str, Callable[[Run, int], Any]] = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}
