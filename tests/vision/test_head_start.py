"""The classifier's start from a linear probe, beside the conditions of its optimum and beside what may not be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from graft.studio.errors import InputError
from graft.studio.job import Job
from graft.vision import VisionBase
from graft.vision.head_start import STRENGTH, solve_probe
from graft.vision.jobs import prepare
from graft.vision.task import VisionTask, predict_pixels


def prepared(folder: Path, photos: Path, method: dict[str, Any], **data: Any) -> VisionTask:
    sections = {"method": method, "data": {"path": str(photos), **data}, "train": {"device": "cpu"}}
    return prepare(Job.load({"base": str(folder), **sections}))


def test_the_probe_is_the_optimum_of_the_penalised_likelihood():
    """At the optimum of a strictly convex loss its gradient, written out by hand, is zero."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 4
    features = rng.normal(size=(60, 7)) * [1, 50, 0.01, 1, 1, 1, 0] + [0, 300, 5, 0, 0, 0, 2.5]
    features[:, 0] += labels
    weight, bias = solve_probe(torch.tensor(features), torch.tensor(labels), 4)
    assert weight.dtype == bias.dtype == torch.float32
    assert not weight[:, 6].any()  # of a feature that is the same everywhere
    deviation = np.where(features.std(0) > 1e-9, features.std(0), 1)
    z = (features - features.mean(0)) / deviation
    w = weight.double().numpy() * deviation
    scores = features @ weight.double().numpy().T + bias.double().numpy()
    p = np.exp(scores - scores.max(1, keepdims=True))
    wrong = p / p.sum(1, keepdims=True) - np.eye(4)[labels]
    assert np.abs(wrong.T @ z / 60 + w / (60 * STRENGTH)).max() < 1e-4
    assert np.abs(wrong.mean(0)).max() < 1e-4


def test_a_job_starts_from_the_probe_of_its_training_pictures(folder: Path, photos: Path):
    drawn = prepared(folder, photos, {"name": "lora"})
    task, again = (prepared(folder, photos, {"name": "lora", "head_start": "probe"}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), again.parameters(), strict=True))
    method = task.handle.method.tensors()
    assert all(torch.equal(method[name], value) for name, value in drawn.handle.method.tensors().items())
    head = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        features = head(task.base.normalise(task.data.train.pixels))
    weight, bias = solve_probe(features, task.data.train.labels, 3)
    found = task.handle.head.tensors()
    torch.testing.assert_close(found["head.weight"], weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["head.bias"], bias, rtol=1e-3, atol=1e-4)
    losses = [
        float(cross_entropy(predict_pixels(each.base, each.data.train.pixels), each.data.train.labels))
        for each in (drawn, task)
    ]
    assert losses[1] < 0.8 * losses[0]
    assert task.adapter({}).card.config["head_start"] == "probe"


def test_the_start_sees_no_other_picture(folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[torch.Tensor] = []

    def noted(base: VisionBase, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(pixels)
        return {"head": torch.randn(len(pixels), 32)}

    monkeypatch.setattr("graft.vision.task.inputs_of_classifiers", noted)
    task = prepared(folder, photos, {"name": "vpt", "head_start": "probe"}, augment="crop")
    assert len(seen) == 1 and torch.equal(seen[0], task.data.train.pixels)


@pytest.mark.parametrize("name", ["vpt", "ssf"])
def test_methods_that_do_not_start_as_the_identity_get_the_probe_of_what_they_start_as(
    folder: Path, photos: Path, name: str
):
    task = prepared(folder, photos, {"name": name, "head_start": "probe"})
    task.bank.eval()
    before = cross_entropy(predict_pixels(task.base, task.data.train.pixels), task.data.train.labels)
    task.bank.train()
    task.start_head()
    task.bank.eval()
    after = cross_entropy(predict_pixels(task.base, task.data.train.pixels), task.data.train.labels)
    assert float(before) == pytest.approx(float(after), rel=1e-5) and float(before) < 0.9


def test_both_classifiers_of_a_distilled_model_are_solved(build, save, photos: Path, tmp_path: Path):
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    architecture = "deit_tiny_distilled_patch16_224"
    task = prepared(
        save(build(architecture), tmp_path / "deit", architecture, settings),
        photos,
        {"name": "adaptformer", "head_start": "probe"},
    )
    found = task.handle.head.tensors()
    assert {"head.weight", "head_dist.weight"} <= set(found)
    assert all(tensor.abs().max() > 0.05 for name, tensor in found.items() if name.endswith("weight"))
    assert not torch.equal(found["head.weight"], found["head_dist.weight"])


def test_another_start_is_refused(folder: Path, photos: Path):
    with pytest.raises(InputError, match="head_start"):
        prepared(folder, photos, {"name": "vpt", "head_start": "zero"})


def test_the_option_is_among_a_methods_settings():
    from graft.studio.commands.methods import settings_of

    (found,) = [row for row in settings_of("graft.vision.vpt:VPT") if row["name"] == "head_start"]
    assert found["default"] == "random" and "linear probe" in found["meaning"]
