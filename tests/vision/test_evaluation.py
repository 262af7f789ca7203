import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from graft.studio.errors import DataError, InputError
from graft.studio.job import Job
from graft.studio.labelled.figures import calibration, confusion, figures_of
from graft.vision.base import VisionBase
from graft.vision.evaluation import EvaluationConfig, evaluate, predict
from graft.vision.jobs import prepare


def test_figures_are_their_formulas():
    logits = torch.tensor([[2.0, 0, 0], [0, 2, 0], [2, 1, 0], [0, 0, 3]])
    labels = torch.tensor([0, 1, 1, 2])
    found = figures_of(logits, labels, bins=1)
    assert found["accuracy"] == 0.75
    assert found["mean_class_accuracy"] == pytest.approx((1 + 0.5 + 1) / 3)
    probabilities = logits.softmax(1)
    assert found["loss"] == pytest.approx(-float(probabilities[range(4), labels].log().mean()))
    assert found["calibration_error"] == pytest.approx(abs(float(probabilities.max(1).values.mean()) - 0.75), abs=1e-6)
    assert confusion(logits, labels).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_calibration_error_is_the_sum_over_bins():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(500, 4, generator=generator).softmax(1)
    labels = torch.randint(4, (500,), generator=generator)
    confidence, told = (each.numpy() for each in probabilities.max(1))
    expected = 0.0
    for k in range(10):
        inside = (confidence > k / 10) & (confidence <= (k + 1) / 10)
        if inside.any():
            right = (told == labels.numpy())[inside]
            expected += inside.mean() * abs(confidence[inside].mean() - right.mean())
    bins, error = calibration(probabilities, labels, 10)
    assert error == pytest.approx(expected, abs=1e-6)
    assert sum(count for *_, count in bins) == 500
    sure = torch.eye(4)[labels]
    assert calibration(sure, labels)[1] == 0


@pytest.fixture
def trained(folder: Path, photos: Path):
    """A task after some steps, and its adapter."""
    job = Job.load(
        {"base": str(folder), "method": {"name": "linear"}, "data": {"path": str(photos)}, "train": {"device": "cpu"}}
    )
    task = prepare(job)
    optimizer = torch.optim.AdamW(task.param_groups(), lr=1e-2)
    for step in range(30):
        optimizer.zero_grad()
        task(task.batch(step, torch.Generator().manual_seed(step)))[0].backward()
        optimizer.step()
    return task, task.adapter({})


def test_the_base_is_measured_by_its_nearest_class_mean(trained, base: VisionBase, photos: Path, tmp_path: Path):
    task, _ = trained
    (tmp_path / "split.jsonl").write_text(task.data.split.text)
    settings = EvaluationConfig(path=str(photos), split=str(tmp_path / "split.jsonl"), part="val")
    found = evaluate(base, None, settings)

    def feature(pixels):
        return normalize(base.model.forward_head(base.model.forward_features(base.normalise(pixels)), pre_logits=True))

    known = feature(task.data.train.pixels)
    means = torch.stack([known[task.data.train.labels == k].mean(0) for k in range(3)])
    told = (feature(task.data.val.pixels) @ normalize(means).T).argmax(1)
    assert found["accuracy"] == pytest.approx(float((told == task.data.val.labels).float().mean()))


def test_an_adapter_is_measured_and_its_pictures_drawn(trained, base: VisionBase, photos: Path, tmp_path: Path):
    task, adapter = trained
    (tmp_path / "split.jsonl").write_text(task.data.split.text)
    settings = EvaluationConfig(path=str(photos), split=str(tmp_path / "split.jsonl"))
    found = evaluate(base, adapter, settings, tmp_path / "out")
    assert found["pictures"] == 6 and found["trained_on"] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "confusion.png", "reliability.png", "predictions.csv", "classes.csv",
    }  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "classes.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == ["across", "down", "slanted"]
    assert np.mean([float(row["accuracy"]) for row in rows]) == pytest.approx(found["mean_class_accuracy"], abs=1e-4)
    every = evaluate(base, adapter, EvaluationConfig(path=str(photos)))
    assert every["pictures"] == 30
    assert adapter.card.metrics["val_accuracy"] == pytest.approx(
        evaluate(base, adapter, EvaluationConfig(path=str(photos), split=settings.split, part="val"))["accuracy"]
    )


def test_test_pictures_that_were_trained_on_are_told(trained, base: VisionBase, photos: Path, tmp_path: Path, caplog):
    task, adapter = trained
    (tmp_path / "split.jsonl").write_text(task.data.split.text)
    held, seen = task.data.split.part("test")[0], task.data.train
    twin = next(name for name in seen.names if name.startswith(held.label))
    (photos / held.name).write_bytes((photos / twin).read_bytes())
    settings = EvaluationConfig(path=str(photos), split=str(tmp_path / "split.jsonl"))
    assert evaluate(base, adapter, settings)["trained_on"] == 1
    assert "also among those that were trained on" in caplog.text


def test_what_cannot_be_measured_is_refused(trained, base: VisionBase, photos: Path, tmp_path: Path):
    _, adapter = trained
    (photos / "down").rename(photos / "up")
    with pytest.raises(DataError, match="does not know the classes up"):
        evaluate(base, adapter, EvaluationConfig(path=str(photos)))
    none = Job.load({"base": base.name, "method": {"name": "linear"}, "data": {"path": str(photos), "test": 0.0}})
    (tmp_path / "split.jsonl").write_text(prepare(none).data.split.text)
    with pytest.raises(DataError, match="no picture is in the part 'test'"):
        evaluate(base, adapter, EvaluationConfig(path=str(photos), split=str(tmp_path / "split.jsonl")))


def test_predictions_are_those_of_the_model(trained, base: VisionBase, photos: Path, tmp_path: Path):
    task, adapter = trained
    rows = predict(base, adapter, [photos / "down"], top=2)
    assert len(rows) == 10 and all(len(row["top"]) == 2 for row in rows)
    own = predict(base, None, [photos / "down" / "0.png"])
    assert own[0]["label"].startswith("thing")
    (tmp_path / "no.png").write_text("hello")
    with pytest.raises(DataError, match="not a picture"):
        predict(base, adapter, [tmp_path / "no.png"])
    with pytest.raises(DataError, match="there are no pictures"):
        predict(base, adapter, [tmp_path / "cache"])
    base.classes = ()
    with pytest.raises(InputError, match="names no classes"):
        predict(base, None, [photos])
