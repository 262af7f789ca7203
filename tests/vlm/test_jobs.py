"""From a folder of pictures to an evaluated adapter, through Python and the command line; and what fit may not see."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import graft
import graft.vlm
from graft.studio.adapter import Adapter, base_hash, load_adapter
from graft.studio.cli import main
from graft.studio.config import write_toml
from graft.studio.errors import DataError, InputError
from graft.studio.job import Job
from graft.studio.runs import open_run
from graft.vlm import previews
from graft.vlm.base import ClipBase, save_base
from graft.vlm.data import TEMPLATES
from graft.vlm.evaluation import EvaluationConfig, evaluate, harmonic_mean
from graft.vlm.head import Setting
from graft.vlm.jobs import prepare
from graft.vlm.pictures import to_pixels

METHODS = {
    "tip_adapter": {}, "tip_adapter_f": {}, "clip_adapter": {}, "task_res": {}, "cross_modal": {}, "prolip": {},
    "coop": {"vectors": 2}, "cocoop": {}, "clip_lora": {},
}  # fmt: skip
TRAIN = {"steps": 3, "batch_size": 4, "device": "cpu", "threads": 1}


@pytest.fixture
def job(tiny_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    data = {"path": str(photos), "views": 2}
    return {"base": str(tiny_folder), "domain": "vlm", "method": {"name": "task_res"}, "data": data, "train": TRAIN}


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """Runs a command with `--json`; returns the exit code and the document."""

    def run(*argv: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = main([*argv, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_trained_saved_and_loaded(name: str, job: dict[str, Any], tmp_path: Path):
    run = graft.train({**job, "method": {"name": name, **METHODS[name]}})
    assert run.status == "finished"
    adapter, base = run.adapter(), graft.load_base(job["base"], "cpu")
    assert adapter.card.domain == "vlm" and adapter.card.details["classes"] == ["cat", "dog", "red cat"]
    assert adapter.card.metrics["validation"]["pictures"] == 6
    before = base_hash(base.modules)
    task = prepare(Job.load({**job, "method": {"name": name, **METHODS[name]}}))
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with adapter.attached(base) as classifier:
        first = classifier.logits_of_pixels(pixels)
        answers = classifier.predict([Image.new("CMYK", (30, 20))])
    assert base_hash(base.modules) == before
    assert sorted(answers[0]) == ["cat", "dog", "red cat"] and abs(sum(answers[0].values()) - 1) < 1e-5
    with load_adapter(adapter.save(tmp_path / "copy")).attached(graft.load_base(job["base"], "cpu")) as again:
        assert torch.equal(again.logits_of_pixels(pixels), first)
    assert task.origin()["data_digest"] == adapter.card.data_digest
    with pytest.raises(InputError, match="is not written in it"):
        adapter.export(tmp_path / "other", "onnx")


def test_equal_seeds_are_equal_bits(job: dict[str, Any]):
    runs = [graft.train({**job, "method": {"name": "clip_adapter"}, "train": {**TRAIN, "seed": s}}) for s in (1, 1, 2)]
    one, same, other = ([*run.adapter().tensors.values()] for run in runs)
    assert all(map(torch.equal, one, same)) and not all(map(torch.equal, one, other))


def test_fit_cannot_see_the_test_pictures(job: dict[str, Any], photos: Path, monkeypatch: pytest.MonkeyPatch):
    """Not a byte of them is read in training, by any way that a file can be opened here."""
    opened: list[str] = []
    real_open, real_image, real_bytes = builtins.open, Image.open, Path.read_bytes

    def watch(path: Any) -> None:
        opened.append(str(path))
        assert not str(path).startswith(str(photos / "test")), f"{path} was opened while fitting"

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            watch(path)
            return function(path, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", watched(real_open))
        patch.setattr(Image, "open", watched(real_image))
        patch.setattr(Path, "read_bytes", watched(real_bytes))
        for name in ("tip_adapter_f", "clip_lora"):
            run = graft.train({**job, "method": {"name": name}})
    assert any(str(photos / "train") in path for path in opened)  # the watch works
    for path in (photos / "test").rglob("*.png"):
        path.write_bytes(b"not a picture")
    again = graft.train({**job, "method": {"name": "clip_lora"}})
    assert again.adapter().card.data_digest == run.adapter().card.data_digest
    assert all(map(torch.equal, again.adapter().tensors.values(), run.adapter().tensors.values()))


def test_a_job_is_trained_as_its_method_usually_is():
    section = {"base": "pocket-clip", "method": {"name": "clip_lora"}, "data": {"path": "x"}}
    assert (Job.load(section).train.steps, Job.load(section).train.weight_decay) == (500, 0.01)
    assert Job.load({**section, "train": {"steps": 7}}).train.steps == 7
    assert Job.load(section).domain == "vlm"
    assert Job.load(Job.load(section)) == Job.load(section)


def test_the_guard_turns_back_to_zero_shot(job: dict[str, Any]):
    task = prepare(Job.load({**job, "method": {"name": "task_res"}}))
    pooled, labels = task.shots.held_pooled, task.shots.held_labels
    plain = task.head.setting.zero_shot(task.base.project(pooled))
    labels.copy_(plain.argmax(1))  # zero-shot is right, so whatever is learnt can only be worse
    with torch.no_grad():
        task.head.get_parameter("residual").copy_(-4 * task.head.setting.weights)
    card = task.adapter({}).card
    assert card.details["strength"] < 1
    assert card.metrics["validation"]["mixed"] == card.metrics["validation"]["zero_shot"] == 1.0
    assert card.metrics["validation"]["trained"] < 1


def test_training_leaves_the_base_in_evaluation_mode(job: dict[str, Any]):
    """Batch norms of a ResNet tower would otherwise follow the few shots."""
    task: Any = prepare(Job.load({**job, "method": {"name": "clip_lora"}}))
    task.train()
    assert task.head.training and not any(m.training for n, m in task.base.model.named_modules())
    assert set(dict(task.named_parameters())) == {f"head.bank.{n}" for n, _ in task.head.bank.named_parameters()}


def test_with_one_shot_there_is_nothing_to_judge_by(job: dict[str, Any], caplog: pytest.LogCaptureFixture):
    run = graft.train({**job, "data": {**job["data"], "shots": 1}})
    assert run.adapter().card.metrics["validation"] is None
    assert "nothing says whether this is better than zero-shot" in (run.folder / "log.txt").read_text()


def test_the_command_line_trains_measures_and_shows(
    job: dict[str, Any], answer: Callable[..., tuple[int, Any]], photos: Path, tmp_path: Path
):
    (tmp_path / "job.toml").write_text(write_toml(job))
    code, document = answer("train", "job.toml", "--set", "data.templates=['the {}.']")
    assert code == 0
    run = document["folder"]
    code, figures = answer("eval", run, "--device", "cpu", "--out", "figures")
    assert code == 0 and figures["base"]["pictures"] == figures["adapter"]["pictures"] == 6
    base = graft.load_base(job["base"], "cpu")
    own = evaluate(base, None, EvaluationConfig(path=str(photos), templates=("the {}.",)))
    assert figures["base"] == own  # the run's own prompts, not the usual ones
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "confusion.png", "reliability.png", "mistakes.png", "map.png", "neighbours.png", "classes.csv",
        "predictions.csv", "report.html",
    }  # fmt: skip
    shown = answer("preview", run, "--device", "cpu", "--out", "seen", "--set", f"path={photos / 'test'}")
    assert shown[0] == 0 and Image.open(tmp_path / "seen" / "sheet.png").size[0] > 100
    assert len(json.loads((tmp_path / "seen" / "answers.json").read_text())) == 6
    assert answer("adapters", "verify", run)[0] == 0
    code, rows = answer("methods")
    assert {row["name"] for row in rows if row["domain"] == "vlm"} == set(METHODS)
    code, document = answer("eval", run, "--data", str(tmp_path / "nowhere"))
    assert code == 2 and "there is no such file or folder" in document["error"]["message"]


def test_predict_is_a_command(
    job: dict[str, Any], answer: Callable[..., tuple[int, Any]], photos: Path, tmp_path: Path
):
    (tmp_path / "job.toml").write_text(write_toml({**job, "method": {"name": "prolip"}}))
    assert answer("train", "job.toml", "--run-dir", "run")[0] == 0
    files = [str(photos / "test" / "dog" / "0.png"), str(photos / "test" / "cat")]
    code, rows = answer("predict", "run", *files, "--set", "top=2")
    assert code == 0 and [row["picture"] for row in rows[:1]] == files[:1] and len(rows) == 3
    base, adapter = graft.load_base(job["base"], "cpu"), load_adapter(Path("run/result"))
    with Image.open(files[0]) as opened, adapter.attached(base) as classifier:
        expected = classifier.predict([opened])[0]
    assert [each["label"] for each in rows[0]["top"]] == list(expected)[:2]
    assert rows[0]["label"] == rows[0]["top"][0]["label"]
    assert rows[0]["probability"] == pytest.approx(next(iter(expected.values())), abs=1e-5)

    code, told = answer("predict", "run", files[0], "--set", "classes=['the_dog', 'photo']", "--set", "top=9")
    assert code == 0 and sorted(each["label"] for each in told[0]["top"]) == ["photo", "the dog"]
    plain = graft.vlm.predict(base, None, files[:1], classes=("cat", "dog"))
    setting = Setting(base, ("cat", "dog"), TEMPLATES)
    with Image.open(files[0]) as opened, torch.no_grad():
        wanted = setting.zero_shot(base.encode_image(to_pixels(opened, base.preprocess)[None])).softmax(1)
    assert plain[0]["probability"] == pytest.approx(float(wanted.max()), abs=1e-5)

    for changed, message in (
        (("predict", "run", files[0], "--set", "tops=1"), "Did you mean 'top'"),
        (("predict", "run", files[0], "--set", "top=0"), "expected 1 or more"),
        (("predict", "run", str(tmp_path / "job.toml")), "1 cannot be read"),
    ):
        code, document = answer(*changed)
        assert code == 2 and message in json.dumps(document), document
    with pytest.raises(InputError, match="nothing to choose from"):
        graft.vlm.predict(base, None, files)
    bound = graft.train(job).adapter()
    with pytest.raises(InputError, match="belongs to the classes"):
        graft.vlm.predict(base, bound, files, classes=("yak", "cat"))
    assert base_hash(base.modules) == base.hash


def test_base_to_new_is_a_command(
    job: dict[str, Any], answer: Callable[..., tuple[int, Any]], photos: Path, tmp_path: Path
):
    for part in ("train", "test"):
        (photos / part / "the_dog").mkdir()
        for k in range(4):
            Image.new("RGB", (16, 16), (k * 20, 200, 0)).save(photos / part / "the_dog" / f"{k}.png")
    (tmp_path / "job.toml").write_text(write_toml({**job, "method": {"name": "cocoop"}}))
    code, document = answer("transfer", "job.toml")
    assert code == 0
    for side in ("zero_shot", "adapter"):
        halves = document[side]["base"], document[side]["new"]
        assert document[side]["harmonic_mean"] == pytest.approx(harmonic_mean(*halves))
    assert load_adapter(Path(document["run"]) / "result").card.details["classes"] == ["cat", "dog"]
    first = document
    code, document = answer("transfer", "job.toml", "--seeds", "2", "--set", "data.shots=2")
    assert code == 0 and len(set(document["runs"])) == 2
    seeds = [(run.job.train.seed, run.job.data["seed"]) for run in map(open_run, document["runs"])]
    assert seeds == [(0, 0), (1, 1)] and set(first) == {"run", "zero_shot", "adapter"}
    told = document["adapter"]
    assert told["harmonic_mean"] == pytest.approx(harmonic_mean(told["base"], told["new"]))
    assert set(told["spread"]) == {"base", "new", "harmonic_mean"}
    assert document["zero_shot"]["spread"]["new"] == 0  # the same pictures, and nothing that a seed draws
    code, document = answer("transfer", "job.toml", "--seeds", "0")
    assert code == 2 and "seeds = 0" in document["error"]["message"]
    code, document = answer("transfer", "job.toml", "--set", "method={name='task_res'}")
    assert code == 2 and "belongs to the classes" in document["error"]["message"]


def test_split_is_a_command(answer: Callable[..., tuple[int, Any]], photos: Path, tmp_path: Path):
    asked = "split", str(photos / "train"), "--test", "0.34", "--validation", "0", "--out", str(tmp_path / "s.jsonl")
    code, document = answer(*asked)
    assert (code, document["train"], document["test"]) == (0, 12, 6)
    code, document = answer(*asked)
    assert code == 2 and "it exists, and results may rest on it" in document["error"]["message"]


def test_several_runs_are_measured_with_mean_and_spread(
    job: dict[str, Any], answer: Callable[..., tuple[int, Any]], tmp_path: Path
):
    for seed in (0, 1, 2):
        train = {**TRAIN, "seed": seed, "learning_rate": 0.05}
        graft.train({**job, "data": {**job["data"], "seed": seed, "shots": 2}, "train": train}, run_dir=f"s{seed}")
    code, one = answer("eval", "s0")
    assert code == 0 and set(one) == {"base", "adapter"}
    code, told = answer("eval", "s0", "s1", "s2", "s1")
    assert code == 0 and list(told["runs"]) == ["s0", "s1", "s2"] and told["runs"]["s0"] == one
    losses = [told["runs"][name]["adapter"]["loss"] for name in ("s0", "s1", "s2")]
    assert told["mean"]["adapter"]["loss"] == pytest.approx(sum(losses) / 3)
    assert told["spread"]["adapter"]["loss"] == pytest.approx(float(torch.tensor(losses).std()), rel=1e-3) != 0
    assert told["spread"]["base"]["loss"] == 0 and "worst" not in told["mean"]["adapter"]
    code, told = answer("eval", "s0", "s1", "--out", "report")
    assert code == 2 and "a report is of one run" in told["error"]["message"]


def test_fewer_classes_in_another_order_and_unknown_ones(job: dict[str, Any], photos: Path):
    adapter, base = graft.train(job).adapter(), graft.load_base(job["base"], "cpu")
    both = evaluate(base, adapter, EvaluationConfig(path=str(photos), classes="base"))
    assert both["pictures"] == 4
    (photos / "test" / "dog").rename(photos / "test" / "yak")
    (photos / "train" / "dog").rename(photos / "train" / "yak")
    with pytest.raises(InputError, match="belongs to the classes"):
        evaluate(base, adapter, EvaluationConfig(path=str(photos)))
    with pytest.raises(InputError, match="nothing to measure on"):
        evaluate(base, adapter, EvaluationConfig())


def test_harmonic_mean():
    assert harmonic_mean(0.8, 0.4) == pytest.approx(0.5333, abs=1e-3) and harmonic_mean(0, 0) == 0


def test_a_name_that_does_not_fit_is_told_before_anything_is_computed(job: dict[str, Any], photos: Path):
    for part in ("train", "test"):
        (photos / part / "dog").rename(photos / part / ("very_long_name_of_a_thing" * 2))
    with pytest.raises(DataError, match="do not fit the 24 of the text tower"):
        graft.train(job)
    assert not Path("runs").exists()


def test_previews_want_pictures(job: dict[str, Any], tmp_path: Path):
    adapter: Adapter = graft.train(job).adapter()
    base: ClipBase = graft.load_base(job["base"], "cpu")
    for path, message in (("", "there are no pictures"), (str(tmp_path / "x.txt"), "it is no picture")):
        (tmp_path / "x.txt").write_text("hello")
        with pytest.raises(InputError, match=message):
            previews.preview(base, adapter, [], [], tmp_path, previews.PreviewConfig(path=path))


def test_a_merged_base_is_the_adapted_one(job: dict[str, Any], tmp_path: Path):
    adapter = graft.train({**job, "method": {"name": "clip_lora"}, "train": {**TRAIN, "learning_rate": 0.1}}).adapter()
    base = graft.load_base(job["base"], "cpu")
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with adapter.attached(base) as classifier:
        expected = base.encode_image(pixels)
        classifier.merge()
        merged = graft.load_base(str(save_base(base, tmp_path / "merged")), "cpu")
    torch.testing.assert_close(merged.encode_image(pixels), expected, rtol=1e-4, atol=1e-4)
