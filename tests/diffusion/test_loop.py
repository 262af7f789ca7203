"""The domain's tasks in the studio's loop, as users run them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import graft
from graft.diffusion.base import DiffusionBase
from graft.diffusion.jobs import prepare
from graft.diffusion.previews import PreviewConfig, draw, fader, grid
from graft.studio.errors import InputError, RunError
from graft.studio.job import Job
from graft.studio.training import resume


def job(folder: Path, photos: Path, method: dict, **train) -> dict:
    settings = {"steps": 4, "batch_size": 2, "threads": 1, "device": "cpu", "mixed_precision": "no", **train}
    return {"base": str(folder), "method": method, "data": {"path": str(photos)}, "train": settings}


TI = {"name": "textual_inversion", "token": "<cat>"}
LORA = {"name": "lora", "rank": 2}


@pytest.mark.parametrize("method", [TI, LORA], ids=["ti", "lora"])
def test_train_ends_with_an_adapter_that_attaches(
    base: DiffusionBase, folder: Path, photos: Path, tmp_path: Path, method: dict
):
    strengths = [1.0] if method is TI else [0.5, 1.0]
    sample = {"every": 2, "steps": 1, "prompts": ["a {token} toy"], "strengths": strengths}
    sampled = job(folder, photos, method) | {"sample": sample}
    run = graft.train(sampled, run_dir=tmp_path / "run")
    assert run.status == "finished"
    names = ["sheet.png", "step-000002.png", "step-000004.png"]
    assert sorted(p.name for p in (run.folder / "samples").iterdir()) == names
    sheet, *steps = (np.asarray(Image.open(run.folder / "samples" / name)) for name in names)
    assert np.array_equal(sheet, np.concatenate(steps))
    assert steps[0].shape[1] == (1 + len(strengths)) * (2 * 128 + 8) + 8  # without, and each strength
    adapter = run.adapter()
    assert adapter.card.base_hash == base.hash and adapter.card.metrics["steps"] == 4
    config, prompts, seeds = PreviewConfig(steps=1), [f"a {adapter.card.trigger} toy"], list(run.job.sample.seeds)
    blocks = {"without": draw(base, prompts, seeds, config)}
    with adapter.attached(base) as handle:
        for strength in strengths:
            fader(handle)(strength)
            blocks["step 4 x 0.5" if strength == 0.5 else "step 4"] = draw(base, prompts, seeds, config)
    saved = np.asarray(grid(blocks, prompts, seeds)).astype(int)
    assert np.abs(steps[1] - saved).max() <= 1  # the last samples are what the saved file draws
    assert np.abs(steps[0] - saved).max() > 1
    quiet = graft.train(job(folder, photos, method), run_dir=tmp_path / "quiet").adapter()
    assert all(torch.equal(quiet.tensors[name], tensor) for name, tensor in adapter.tensors.items())


def test_resume_refuses_other_pictures(folder: Path, photos: Path, tmp_path: Path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "0.png").write_bytes((photos / "0.png").read_bytes())
    run = graft.train(job(folder, mine, LORA), run_dir=tmp_path / "run")
    run.write_state(status="stopped")  # as if it had been asked to stop before its last step
    (mine / "0.png").write_bytes((photos / "3.png").read_bytes())
    with pytest.raises(RunError, match="data_digest"):
        resume(run)
    (mine / "0.png").write_bytes((photos / "0.png").read_bytes())
    assert resume(run).status == "finished"


@pytest.mark.parametrize("method", [TI, LORA], ids=["ti", "lora"])
def test_train_many_equals_each_alone(folder: Path, photos: Path, tmp_path: Path, method: dict):
    other = tmp_path / "other"
    other.mkdir()
    (other / "0.png").write_bytes((photos / "3.png").read_bytes())
    own = {"seed": 5, "steps": 2, "batch_size": 3, "learning_rate": 2e-3, "schedule": "cosine"}
    jobs = [job(folder, photos, method, log_every=2), job(folder, other, method, log_every=2, **own)]
    together = graft.train_many(jobs, runs=tmp_path / "runs")
    assert len(together[0].group) == 2 and [run.state["step"] for run in together] == [4, 2]
    for i, each in enumerate(jobs):
        run = graft.train(each, run_dir=tmp_path / f"alone-{i}")
        assert [row["loss"] for row in together[i].metrics()] == pytest.approx(
            [row["loss"] for row in run.metrics()], rel=1e-3
        )
        alone = run.adapter()
        shared = together[i].adapter()
        assert shared.card.data_digest == alone.card.data_digest
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(shared.tensors[name], tensor, rtol=2e-3, atol=2e-5)


def test_the_validation_loss_is_the_same_whenever_the_weights_are(folder: Path, photos: Path):
    held = job(folder, photos, LORA) | {"data": {"path": str(photos), "validation": 0.4}}
    task = prepare(Job.load(held))
    assert len(task.sources[0].mean) == 3 and len(task.validation[0].mean) == 2
    assert len(task.subjects[0].dataset.pictures) == 3
    state = torch.random.get_rng_state()
    first = task.validate()
    assert task.validate() == first and torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.5)
    assert task.validate() != first
    alone = prepare(Job.load(held | {"data": {"path": str(photos), "validation": str(photos)}}))
    assert len(alone.sources[0].mean) == len(alone.validation[0].mean) == 5


@pytest.mark.slow
def test_jobs_in_a_batch_have_their_own_validation_loss(folder: Path, photos: Path, tmp_path: Path):
    method = {"name": "pivotal", "trigger": "<cat>", "rank": 2}
    settings = {"steps": 2, "validate_every": 1, "log_every": 1}
    jobs = [job(folder, photos, method, seed=seed, **settings) for seed in (0, 1)]
    for each in jobs:
        each["data"]["validation"] = 0.4
    together = graft.train_many(jobs, runs=tmp_path / "runs")
    assert len(together[0].group) == 2
    for i, each in enumerate(jobs):
        alone = graft.train(each, run_dir=tmp_path / f"alone-{i}").metrics()
        shared = together[i].metrics()
        assert [row["validation_loss"] for row in shared] == pytest.approx(
            [row["validation_loss"] for row in alone], rel=1e-3
        )


def test_validation_without_pictures_is_refused(folder: Path, photos: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"data\.validation"):
        graft.train(job(folder, photos, LORA, validate_every=2), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
