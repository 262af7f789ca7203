"""From a folder of pictures to a trained adapter, its figures, predictions, and a model for timm."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from graft.studio.cli import main
from graft.studio.config import write_toml
from graft.vision.base import VisionBase

Answer = Callable[..., tuple[int, Any]]


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """Runs a command with `--json`; returns the exit code and the document."""

    def run(*argv: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = main([*argv, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def job(folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    train = {"steps": 40, "batch_size": 12, "device": "cpu", "threads": 1, "learning_rate": 1e-2}
    (tmp_path / "job.toml").write_text(
        write_toml(
            {
                "base": str(folder),
                "method": {"name": "lora", "rank": 2, "targets": ["q", "v"]},
                "data": {"path": "photos"},
                "train": train,
                "sample": {"every": 40},
            }
        )
    )
    return str(tmp_path / "job.toml")


def test_from_pictures_to_a_model_for_timm(job: str, base: VisionBase, photos: Path, tmp_path: Path, answer: Answer):
    code, told = answer("train", job, "--run-dir", "run")
    assert code == 0 and told["status"] == "finished"
    run = Path("run")
    assert (run / "result" / "preview.png").exists()
    card = json.loads((run / "result" / "adapter.json").read_text())
    assert card["domain"] == "vision" and card["details"]["classes"] == ["across", "down", "slanted"]
    assert card["metrics"]["parameters"] == 3 * 2 * 2 * (32 + 32) and card["metrics"]["head_parameters"] == 3 * 33
    assert card["metrics"]["val_accuracy"] > 0.5

    code, figures = answer("eval", "run", "--out", "report")
    assert code == 0
    assert figures["adapter"]["accuracy"] > 0.6
    assert figures["adapter"]["pictures"] == figures["base"]["pictures"] == 6
    assert figures["adapter"]["trained_on"] == 0
    page = Path("report/report.html").read_text()
    assert "confusion" in page and "reliability" in page
    rows = list(csv.DictReader(Path("report/predictions.csv").read_text().splitlines()))
    assert sum(row["class"] == row["told"] for row in rows) / 6 == pytest.approx(figures["adapter"]["accuracy"])
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "evaluated" for event in events) == 1

    code, rows = answer("predict", "run", str(photos / "down" / "1.png"), str(photos / "across"))
    assert code == 0 and len(rows) == 11
    assert rows[0]["label"] == rows[0]["top"][0]["label"]

    code, told = answer("adapters", "verify", "run")
    assert code == 0 and told["detaches"] and told["uncompared"] is None
    assert told["compared"]["library"] == "timm" and told["compared"]["same"]
    assert told["compared"]["error"] < 1e-3 and told["compared"]["change"] > 0.01
    code, _ = answer("adapters", "merge", "run", "merged")
    assert code == 0
    model = timm.create_model("local-dir:merged", pretrained=True).eval()
    assert model.num_classes == 3
    x = base.normalise(base.pixels(Image.open(photos / "down" / "1.png"))[None])
    probability = model(x).softmax(-1).max()
    torch.testing.assert_close(float(probability.detach()), rows[0]["probability"], rtol=1e-4, atol=1e-5)
    assert answer("adapters", "convert", "run", "same", "--to", "timm")[0] == 0
    assert answer("adapters", "convert", "run", "other", "--to", "kohya")[0] == 2


def test_preview_is_refused_with_the_alternative(job: str, answer: Answer):
    assert answer("train", job, "--run-dir", "run", "--set", "train.steps=1")[0] == 0
    code, told = answer("preview", "run")
    assert code == 2 and "graft predict" in json.dumps(told)


def test_a_stopped_run_goes_on_with_the_same_bits(job: str, answer: Answer):
    from graft.studio.adapter import Adapter
    from graft.studio.runs import open_run
    from graft.studio.training import resume

    settings = ["--set", "train.steps=6", "--set", "sample.every=0", "--set", "train.checkpoint_every=3"]
    settings += ["--set", "data.augment=crop", "--set", "method.dropout=0.1", "--set", "method.head_start=probe"]
    answer("train", job, "--run-dir", "whole", *settings)
    answer("train", job, "--run-dir", "cut", *settings)
    cut = open_run("cut")
    (cut.folder / "checkpoints" / "LATEST").write_text("000003")
    for path in (cut.folder / "checkpoints").iterdir():
        if path.name.endswith("6"):
            import shutil

            shutil.rmtree(path)
    cut.write_state(status="stopped")
    resume(cut)
    one, two = (Adapter.load(Path(name) / "result").tensors for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
