"""Every method on classes that the base has never seen: accuracy by shots, over seeds, beside zero-shot.

A seed draws its own classes, training pictures and test pictures from the embedded world's new sprites. Methods have
their default settings but for `METHOD` and `TRAIN`; what they choose they choose from the shots, and the test pictures
are read once, at the end. Beside them stands a linear probe on the frozen features, which knows no class name.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from statistics import mean, stdev
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from graft.studio.batches import step_seed
from graft.studio.bench.rows import kept_rows
from graft.studio.config import to_dict
from graft.studio.disk import write_json
from graft.studio.errors import InputError
from graft.studio.job import Job, TrainConfig
from graft.studio.labelled.figures import figures_of
from graft.studio.loop import learning_rate
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.scenes import render, sample_scene
from graft.studio.registry import METHODS, method_class
from graft.vlm.base import ClipBase, load_base
from graft.vlm.data import DataConfig, labels_of, measured_data
from graft.vlm.evaluation import logits_of
from graft.vlm.head import Setting
from graft.vlm.jobs import FewShotTask, classifier, prepared
from graft.vlm.store import FeatureStore

METHOD: dict[str, dict[str, Any]] = {
    "cocoop": {"words": "", "vectors": 16, "safe": True},
    "prolip": {"strength": 0.1},
}
"""These classes are not in the text tower's world, so that the image side has to move farther than from CLIP: ProLIP is
held a tenth as firmly as in the paper, and CoCoOp has as many free vectors as CoOp."""
TRAIN: dict[str, dict[str, Any]] = {
    "clip_lora": {"learning_rate": 1e-2, "steps": 50},
    "cocoop": {"learning_rate": 5e-3, "steps": 100},
}
"""The paper's rate for CLIP-LoRA, 2e-4, is that of large towers; on these, 192 wide and three or four layers deep, 500
such steps hardly move them. Steps here are those of one shot; they grow with the root of the shots, where the paper's
grow with their number."""
BASELINES = ("zero_shot", "linear_probe")


def few_shot(
    out: Path | None = None,
    base: str = "pocket-clip",
    classes: int = 50,
    shots: str = "1,2,4,8,16",
    seeds: int = 3,
    tests: int = 10,
    views: int = 10,
    methods: str = "all",
) -> dict[str, Any]:
    """Measures and returns the table; writes `few-shot.json` into `out` if given, and measures nothing twice there.

    Args:
        out: folder for the pictures and the result.
        base: a base that knows the embedded world.
        classes: new classes of each seed.
        shots: training pictures of each class, in turn.
        seeds: how often everything is drawn anew.
        tests: test pictures of each class.
        views: crops of each training picture.
        methods: names with commas between, or all.

    Raises:
        InputError: an unknown method.
    """
    known = sorted(name for domain, name in METHODS if domain == "vlm")
    names = known if methods == "all" else [name.strip() for name in methods.split(",")]
    if not set(names) <= set(known):
        raise InputError(f"methods = {methods!r}", "there is no such method", f"Known: {', '.join(known)}")
    counts = [int(part) for part in str(shots).split(",")]
    loaded, costs = load_base(base, "cpu"), dict[str, Any]()
    work = {"base": loaded.hash, "classes": classes, "shots": max(counts), "tests": tests, "views": views}
    path = None if out is None else Path(out) / "few-shot.json"
    rows = kept_rows(path, work)
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(seeds):
            folder = Path(out or scratch) / f"pictures-{seed}"
            write_pictures(folder, classes, max(counts), tests, seed)
            done = {(row["method"], row["shots"]) for row in rows if row["seed"] == seed}
            for row in _measured(loaded, folder, names, counts, seed, views, done):
                rows.append(row)
                if path is not None:  # a long measurement that is stopped leaves what it has
                    write_json(path, {"work": work, "rows": rows, **summary(rows)})
            for name in [] if seed else names:
                costs[name] = _cost(_task(loaded, folder, name, max(counts), seed, views))
    return {"work": work, "rows": rows, "costs": costs, **summary(rows, costs)}


def write_pictures(folder: Path, classes: int, shots: int, tests: int, seed: int) -> None:
    """Writes scenes of one new sprite each into `train/CLASS` and `test/CLASS`."""
    atlas, rng = Atlas.load(), np.random.default_rng(seed)
    for sprite in rng.permutation(atlas.new)[:classes]:
        for part, count in (("train", shots), ("test", tests)):
            where = folder / part / atlas.names[sprite].replace(" ", "_").replace("/", "-")
            where.mkdir(parents=True, exist_ok=True)
            for k in range(count):
                picture = render(sample_scene(rng, [int(sprite)], objects=(1.0,)))
                Image.fromarray(picture).save(where / f"{k:03d}.png")


def _measured(
    base: ClipBase,
    folder: Path,
    names: Sequence[str],
    counts: Sequence[int],
    seed: int,
    views: int,
    done: Set[tuple[str, int]] = frozenset(),
) -> Iterator[dict[str, Any]]:
    """Rows of one seed that are not done: zero-shot first, then the linear probe and every method by shots."""
    plain = DataConfig(path=str(folder))
    classes, examples, _ = measured_data(plain)
    setting, wanted = Setting(base, classes, plain.templates), labels_of(examples)
    pooled = FeatureStore().get(base, examples, plain, [0])[:, 0]
    zero = figures_of(setting.zero_shot(base.project(pooled)), wanted)["accuracy"]
    if ("zero_shot", 0) not in done:
        yield {"method": "zero_shot", "shots": 0, "seed": seed, "accuracy": zero, "gain": 0.0, "seconds": 0.0}
    for name, count in ((name, count) for name in ("linear_probe", *names) for count in counts):
        if (name, count) in done:
            continue
        start = time.process_time()
        if name == "linear_probe":
            shots = _task(base, folder, "task_res", count, seed, views).shots
            weight, bias = linear_probe(
                base.project(shots.crops).flatten(0, 1), shots.labels.repeat_interleave(views or 1)
            )
            logits = F.normalize(base.project(pooled), dim=-1) @ weight.T + bias
            spent = time.process_time() - start
        else:
            task = _task(base, folder, name, count, seed, views)
            adapter = fit(task, task.job.train).adapter({})
            spent = time.process_time() - start
            trained = classifier(task, adapter)
            logits = logits_of(trained, examples, plain)
            trained.detach()
        reached = figures_of(logits, wanted)["accuracy"]
        yield {"method": name, "shots": count, "seed": seed, "accuracy": reached, "gain": reached - zero,
               "seconds": spent}  # fmt: skip


def _task(base: ClipBase, folder: Path, name: str, count: int, seed: int, views: int) -> FewShotTask:
    """One method on one number of shots, ready for its first step."""
    data, settings = DataConfig(path=str(folder), shots=count, seed=seed, views=views), METHOD.get(name, {})
    train = dict(TRAIN.get(name, {}))
    if "steps" in train:
        train["steps"] = round(train["steps"] * count**0.5)
    job = Job.load({
        "base": base.name, "domain": "vlm", "method": {"name": name, **settings}, "data": to_dict(data),
        "train": train,
    })  # fmt: skip
    return prepared(job, method_class("vlm", name)(**settings), data, base)


def linear_probe(features: Tensor, labels: Tensor, decay: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weight and bias of the logistic regression on unit features (n, e): the optimum, which no test picture chose.

    Args:
        features: one row for each crop.
        labels: (n,) long.
        decay: of the squared weight beside the mean loss, for features at length sqrt(e).
    """
    size = features.shape[1] ** 0.5
    features = F.normalize(features, dim=-1) * size
    weight = torch.zeros(int(labels.max()) + 1, features.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach() * size, bias.detach()


def _cost(task: FewShotTask) -> dict[str, float]:
    """Parameters that are trained, and MiB that a step keeps for its backward pass beside the weights."""
    known = {each.untyped_storage().data_ptr() for each in task.base.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    task.train()
    trained = [each for each in task.parameters() if each.requires_grad]
    if trained:
        batch = task.batch(0, torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            _ = task(batch)[0]
    task.head.detach()
    return {"parameters": sum(each.numel() for each in trained), "saved_mib": sum(kept.values()) / 2**20}


def fit(task: FewShotTask, train: TrainConfig) -> FewShotTask:
    """Trains as the loop does, step for step, without a run folder."""
    parameters = [p for p in task.parameters() if p.requires_grad]
    if not parameters:
        return task
    task.train()
    peak = train.learning_rate or task.default_learning_rate
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=train.weight_decay)
    for step in range(train.steps):
        seed = step_seed(train.seed, step, 0, 0)
        batch = task.batch(step, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, peak, step)
        task(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    return task


def summary(rows: Sequence[dict[str, Any]], costs: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Mean and spread over seeds, whether each gain exceeds its spread, and the table."""
    found: dict[str, dict[str, Any]] = {}
    for method, count in dict.fromkeys((row["method"], row["shots"]) for row in rows):
        own = [row for row in rows if (row["method"], row["shots"]) == (method, count)]
        accuracy, gain = [row["accuracy"] for row in own], [row["gain"] for row in own]
        spread = stdev(gain) if len(gain) > 1 else 0.0
        found[f"{method} {count}"] = {
            "accuracy": mean(accuracy), "spread": stdev(accuracy) if len(own) > 1 else 0.0, "gain": mean(gain),
            "least_gain": min(gain), "beats": mean(gain) > spread and min(gain) >= 0,
            "seconds": mean(row["seconds"] for row in own),
        }  # fmt: skip
    trained = [value["beats"] for key, value in found.items() if not key.startswith(BASELINES)]
    return {"summary": found, "passed": bool(trained) and all(trained), "table": _table(found, costs)}


def _table(found: dict[str, dict[str, Any]], costs: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(key.rsplit(" ", 1)[0] for key in found))
    counts = sorted({int(key.rsplit(" ", 1)[1]) for key in found if not key.startswith("zero_shot")})
    lines = [
        "accuracy in % over seeds; CPU seconds at the most shots, features from the store where they are there;",
        "trained parameters, and MiB that a step keeps for its backward pass",
        "",
    ]
    lines.append(f"{'':16}" + "".join(f"{count:>8} shots" for count in counts) + "   seconds parameters     MiB")
    for name in names:
        cells = [found.get(f"{name} {0 if name == 'zero_shot' else count}") for count in counts]
        shown = (f"{100 * c['accuracy']:6.1f} ± {100 * c['spread']:4.1f}" if c else " " * 13 for c in cells)
        last = next((f"{c['seconds']:10.1f}" for c in reversed(cells) if c), "")
        cost = f"{costs[name]['parameters']:11,} {costs[name]['saved_mib']:7.1f}" if name in costs else ""
        lines.append(f"{name:16} " + " ".join(shown) + last + cost)
    bad = [key for key, value in found.items() if not key.startswith(BASELINES) and not value["beats"]]
    lines += ["", f"not above zero-shot by more than the spread: {', '.join(bad) or 'none'}"]
    return "\n".join(lines)
