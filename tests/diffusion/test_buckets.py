"""Pictures of several shapes: which shape each gets, and in what order batches come; every method trains on them."""

import json
from collections import Counter
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import graft
from graft.diffusion.base import load_base
from graft.diffusion.buckets import nearest, shapes
from graft.diffusion.data import DataConfig, load_buckets
from graft.diffusion.jobs import prepare, prepare_together
from graft.diffusion.objectives import Flow
from graft.diffusion.task import dealt
from graft.studio.caches import Cache
from graft.studio.errors import InputError
from graft.studio.job import Job
from graft.studio.training import resume

SIZES = [(64, 40), (40, 64), (90, 56), (48, 48), (200, 126), (64, 64), (39, 64)]  # width, height
WIDE, TALL, SQUARE = (24, 40), (40, 24), (32, 32)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Seven pictures of seven sizes, each of one colour and with a caption that names it."""
    path = tmp_path / "mixed"
    path.mkdir()
    for i, size in enumerate(SIZES):
        Image.new("RGB", size, (30 * i, 10, 200)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"a <cat> {'abcdefg'[i]}")
    return path


def job(base: Path | str, photos: Path, method: dict, data: dict | None = None, **train) -> Job:
    settings = {"steps": 4, "batch_size": 2, "device": "cpu", "threads": 1, "mixed_precision": "no", **train}
    data = {"path": str(photos), "resolution": 32, "buckets": True, **(data or {})}
    return Job.load({"base": str(base), "domain": "diffusion", "method": method, "data": data, "train": settings})


def test_shapes_are_of_one_area_and_the_least_is_cut_off():
    for side, multiple in ((512, 64), (1024, 64), (64, 16)):
        found = shapes(side, multiple, 2.0)
        assert (side, side) in found and {(w, h) for h, w in found} == set(found)
        assert all(h % multiple == w % multiple == 0 and max(h, w) <= 2 * min(h, w) for h, w in found)
        assert all(abs(log(h * w / side**2)) < 0.23 for h, w in found)
    assert nearest((4000, 3000), shapes(512, 64, 2.0)) == (448, 576)
    assert nearest((3000, 4000), shapes(512, 64, 2.0)) == (576, 448)
    assert nearest((9000, 1000), shapes(512, 64, 2.0)) == (384, 704)


def test_a_picture_is_cut_to_its_shape_and_keeps_its_caption(mixed: Path):
    sets = load_buckets(DataConfig(path=str(mixed), buckets=True), 32, 8, Cache())
    assert [(each.shape, len(each.pictures)) for each in sets] == [(WIDE, 3), (SQUARE, 2), (TALL, 2)]
    for each in sets:
        for picture, pixels in zip(each.pictures, each.pixels, strict=True):
            number = int(picture.path.stem)
            assert pixels.shape == (1, 3, *each.shape) and pixels[0, 0].unique().tolist() == [30 * number]
            assert picture.caption == f"a <cat> {'abcdefg'[number]}"


@pytest.mark.parametrize("counts", [(3, 2, 2), (9, 1), (8, 4), (1, 1, 1), (5, 16)])
def test_no_picture_is_lost_or_comes_more_often_than_another(counts: tuple[int, ...]):
    rows, seen, batch = 4, Counter[tuple[int, int]](), 0
    for round_ in range(1, 3):
        while sum(seen.values()) < round_ * sum(counts) * rows // np.gcd.reduce([rows, *counts]):
            shape, picks = dealt(counts, rows, 5, batch)
            assert len(picks) == rows
            seen.update((shape, int(pick)) for pick in picks)
            assert (
                max(v for k, v in seen.items() if k[0] == shape) - min(seen[shape, i] for i in range(counts[shape]))
                <= 1 + rows // counts[shape]
            )  # a shape deals all its pictures before it deals one again
            batch += 1
        assert set(seen.values()) == {round_ * rows // np.gcd.reduce([rows, *counts])}
        assert set(seen) == {(shape, i) for shape, n in enumerate(counts) for i in range(n)}


def test_the_order_depends_on_the_seed_alone():
    def order(seed: int) -> list[list[int]]:
        batches = (dealt((3, 2, 2), 2, seed, i) for i in range(20))
        return [[shape, *picks.tolist()] for shape, picks in batches]

    assert order(1) == order(1) != order(2)
    shape, picks = dealt((3, 2, 2), 2, 1, 17)  # a resumed training asks for no earlier one
    assert [shape, *picks.tolist()] == order(1)[17]


TI = {"name": "textual_inversion", "token": "<cat>"}
LORA = {"name": "lora", "rank": 2, "trigger": "<cat>"}


def test_latents_keep_their_captions_in_every_batch(folder: Path, mixed: Path):
    task = prepare(job(folder, mixed, TI))
    texts = [text for _, text in (entry for entry in _table(task))]
    whole: dict[bytes, str] = {}
    for source, dataset in zip(task.sources, task.subjects[0].datasets, strict=True):
        for mean, picture in zip(source.mean, dataset.pictures, strict=True):
            whole[mean[0].numpy().tobytes()] = picture.caption or ""
    shapes_seen = set()
    for step in range(14):
        batch = task.batch(step, torch.Generator().manual_seed(step))
        shapes_seen.add(tuple(batch.mean.shape[-2:]))
        told = [texts[batch.prompts[place]] for place in batch.prompt_of]
        assert [whole[mean.numpy().tobytes()] for mean in batch.mean] == told
    assert shapes_seen == {(12, 20), (20, 12), (16, 16)}


def _table(task) -> list[tuple[int, str]]:
    """The prompts of a task in the order of their rows: as `PromptTable` adds them, shape by shape."""
    captions = [picture.caption for dataset in task.subjects[0].datasets for picture in dataset.pictures]
    return [(0, caption) for caption in captions]


CLASS = {"class_prompt": "a photo of a toy", "class_pictures": 3}
METHODS: dict[str, dict[str, Any]] = {
    "textual_inversion": TI,
    "lora": {**LORA, **CLASS},
    "dora": {**LORA, "name": "dora"},
    "pivotal": {**LORA, "name": "pivotal"},
    "custom_diffusion": {"name": "custom_diffusion", "token": "<cat>", **CLASS},
    "controlnet": {"name": "controlnet", "condition": "canny"},
    "controlnet-maps": {"name": "controlnet", "condition": "depth"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_every_shape(
    folder: Path, mixed: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("graft.diffusion.lora._draw", _drawn)
    if name == "controlnet-maps":
        (mixed / "conditions").mkdir()
        for path in mixed.glob("*.png"):
            (mixed / "conditions" / path.name).write_bytes(path.read_bytes())
    task = prepare(job(folder, mixed, METHODS[name]))
    seen = set()
    for step in range(7):
        batch = task.batch(step, torch.Generator().manual_seed(step))
        seen.add(tuple(batch.mean.shape[-2:]))
        if name == "controlnet-maps":
            colours = batch.extras["control"][:, 0, 0, 0].tolist()
            assert batch.extras["control"].shape[-2:] == tuple(2 * side for side in batch.mean.shape[-2:])
            assert len({30 * i for i in range(7)} & set(colours)) == len(set(colours))
        loss, _ = task(batch)
        loss.backward()
        assert bool(loss.isfinite())
    assert len(seen) == 3
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in task.parameters())


def _drawn(base, prompt, seed, shape, steps, guidance):
    side = int(base.pipe.vae_scale_factor)
    return {"latents": torch.zeros(4, shape[0] // side, shape[1] // side)}


@pytest.mark.slow
def test_the_class_gets_its_share_in_every_shape(folder: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("graft.diffusion.lora._draw", _drawn)
    task = prepare(job(folder, mixed, METHODS["lora"]))
    own, prior = task.sources[::2], task.sources[1::2]
    assert [len(source.mean) for source in own] == [3, 2, 2]
    assert [len(source.mean) for source in prior] == [2, 1, 1]
    assert all(a.mean.shape[2:] == b.mean.shape[2:] for a, b in zip(own, prior, strict=True))


@pytest.mark.slow
def test_a_resumed_training_ends_with_the_same_bits(folder: Path, mixed: Path, tmp_path: Path):
    given = job(folder, mixed, LORA, steps=4, gradient_accumulation=2)
    whole = graft.train(given, run_dir=tmp_path / "whole")
    from graft.diffusion.task import DiffusionTask

    original = DiffusionTask.batch

    def stopping(self, number, *generators):
        if number == 5 and not (tmp_path / "asked").exists():
            (tmp_path / "asked").touch()
            graft.studio.runs.Run(tmp_path / "cut").request("stop")
        return original(self, number, *generators)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionTask, "batch", stopping)
        cut = graft.train(given, run_dir=tmp_path / "cut")
        assert cut.status == "stopped"
    cut = resume(cut)
    one, two = whole.adapter(), cut.adapter()
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    assert one.card.data_digest == two.card.data_digest != ""


@pytest.mark.slow
def test_xl_is_told_the_true_size_and_crop(xl: Path, tmp_path: Path):
    photos = tmp_path / "one"
    photos.mkdir()
    picture = np.zeros((50, 100, 3), np.uint8)
    picture[:, 60:] = 255
    Image.fromarray(picture).save(photos / "wide.png")
    told = prepare(job(xl, photos, LORA, {"buckets": False})).batch(0, torch.Generator().manual_seed(0))
    # The square is the middle of the 32 x 64 pixels that the picture has when it is scaled to the shape.
    assert told.extras["sizes"].tolist() == [[50, 100, 0, 16, 32, 32]] * 2
    data: dict[str, Any] = {"buckets": False, "crop": "random", "flip": True, "variants": 8}
    source = prepare(job(xl, photos, LORA, data)).sources[0]
    dataset = load_buckets(DataConfig(path=str(photos), **data, resolution=32), 32, 8, Cache())[0]
    for k, (sizes, pixels) in enumerate(zip(source.facts["sizes"][0], dataset.pixels[0], strict=True)):
        shown = np.asarray(Image.fromarray(picture).resize((64, 32)))[:, :: -1 if k % 2 else 1]
        left = int(sizes[3])
        assert np.abs(shown[:, left : left + 32].astype(int) - pixels.permute(1, 2, 0).numpy()).mean() < 16
    wide = prepare(job(xl, photos, LORA)).batch(0, torch.Generator().manual_seed(0))
    assert wide.extras["sizes"].tolist() == [[50, 100, 0, 0, 24, 48]] * 2


@pytest.mark.slow
def test_noise_levels_shift_with_the_tokens_of_the_shape(folder: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch):
    from diffusers import FlowMatchEulerDiscreteScheduler

    from graft.diffusion.base import DiffusionBase

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=16)
    base = load_base(str(folder), "cpu")
    base.pipe.scheduler = scheduler
    monkeypatch.setattr(DiffusionBase, "tokens", lambda self, side: (side // 8) ** 2)
    monkeypatch.setattr("graft.diffusion.jobs.load_base", lambda *args, **more: base)
    task = prepare(job(folder, mixed, LORA))
    found = [source.objective for source in task.sources]
    assert all(isinstance(each, Flow) for each in found)
    shift = {n: float(np.exp(0.5 + 0.65 * (n - 4) / 12)) for n in (15, 16)}
    assert [each.shift for each in found if isinstance(each, Flow)] == pytest.approx([shift[15], shift[16], shift[15]])


def test_jobs_with_shapes_are_trained_alone(folder: Path, mixed: Path):
    with pytest.raises(InputError, match="a shared batch is of one shape"):
        prepare_together([job(folder, mixed, TI), job(folder, mixed, TI)])


@pytest.mark.parametrize("wrong", [{"bucket_aspect": 0.5}, {"mask_outside": 1.5}, {"mask": "maybe"}])
def test_settings_out_of_range_are_refused(wrong: dict):
    with pytest.raises(InputError, match=f"data.{next(iter(wrong))} = "):
        DataConfig(path="x", **wrong)


def test_rounds_hold_for_pictures_of_one_shape_too(folder: Path, photos: Path):
    task = prepare(job(folder, photos, TI))
    (source,) = task.sources
    means = [mean for step in range(5) for mean in task.batch(step, torch.Generator().manual_seed(step)).mean]
    rows = [int((source.mean[:, 0] == mean).flatten(1).all(1).nonzero()) for mean in means]
    assert Counter(rows) == dict.fromkeys(range(5), 2) and set(rows[:5]) == set(range(5))


def test_jsonl_captions_stay_with_their_pictures(mixed: Path):
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}) for i in reversed(range(7))]
    (mixed / "metadata.jsonl").write_text("\n".join(lines))
    for each in load_buckets(DataConfig(path=str(mixed), buckets=True), 32, 8, Cache()):
        assert [picture.caption for picture in each.pictures] == [f"number {p.path.stem}" for p in each.pictures]
