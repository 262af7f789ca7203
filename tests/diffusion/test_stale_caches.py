"""Nothing that is cached outlives what it was made from, and nothing drawn is frozen with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graft.diffusion.base import DiffusionBase
from graft.diffusion.data import DataConfig, Dataset, load_dataset
from graft.diffusion.jobs import prepare
from graft.diffusion.method import encoded, latents
from graft.studio.caches import Cache
from graft.studio.errors import InputError
from graft.studio.job import Job

COUNTS = dict[tuple[str, str], int]


def fill(photos: Path, base: DiffusionBase, **settings) -> tuple[COUNTS, Dataset, torch.Tensor]:
    """Loads pictures, latents and captions; returns what the cache says, the pictures and the latents."""
    cache = Cache()
    dataset = load_dataset(DataConfig(path=str(photos), **settings), 16, cache)
    posterior = latents(base, dataset, cache)
    encoded(base, [picture.caption or "" for picture in dataset.pictures], cache)
    return dict(cache.counts), dataset, posterior["mean"]


@pytest.fixture
def captioned(photos: Path) -> Path:
    for i in range(5):
        (photos / f"{i}.txt").write_text("abcde"[i])
    return photos


def misses(counts: COUNTS) -> dict[str, int]:
    return {kind: count for (kind, what), count in counts.items() if what == "miss"}


@pytest.mark.slow
def test_everything_is_found_again(captioned: Path, base: DiffusionBase):
    assert misses(fill(captioned, base)[0]) == {"pixels": 5, "latents": 5, "text": 5}
    assert misses(fill(captioned, base)[0]) == {}


def test_other_bytes_under_the_same_name_and_date_are_another_picture(captioned: Path, base: DiffusionBase):
    import os

    _, before, _ = fill(captioned, base)
    file, stat = captioned / "2.png", (captioned / "2.png").stat()
    Image.new("RGB", (24, 16), "red").save(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    counts, after, _ = fill(captioned, base)
    assert misses(counts) == {"pixels": 1, "latents": 1}
    assert not torch.equal(before.pixels[2], after.pixels[2]) and before.digest != after.digest


def test_another_orientation_is_another_picture(captioned: Path, base: DiffusionBase):
    pixels = Image.open(captioned / "2.png").copy()
    _, before, _ = fill(captioned, base)
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels.save(captioned / "2.png", exif=exif)
    counts, after, _ = fill(captioned, base)
    assert misses(counts) == {"pixels": 1, "latents": 1}
    assert torch.equal(after.pixels[2], before.pixels[2].flip(-1, -2))


def test_another_caption_is_another_text_and_the_same_latents(captioned: Path, base: DiffusionBase):
    _, before, same = fill(captioned, base)
    (captioned / "2.txt").write_text("a red toy")
    counts, after, again = fill(captioned, base)
    assert misses(counts) == {"text": 1}
    assert torch.equal(same, again) and before.digest != after.digest


def test_another_autoencoder_makes_other_latents_and_the_same_text(captioned: Path, base: DiffusionBase):
    fill(captioned, base)
    other = DiffusionBase(base.name, base.pipe)
    with torch.no_grad():
        other.pipe.vae.quant_conv.bias.add_(1)
    counts, _, _ = fill(captioned, other)
    assert misses(counts) == {"latents": 5}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"background": "black"}, {"crop": "random", "variants": 2}, {"resolution": 24}])
def test_another_transform_is_another_picture(captioned: Path, base: DiffusionBase, settings: dict):
    fill(captioned, base)
    counts, dataset, _ = fill(captioned, base, **settings)
    assert misses(counts) == dict.fromkeys(("pixels", "latents"), dataset.pixels.shape[0] * dataset.pixels.shape[1])


@pytest.mark.slow
def test_renaming_moves_nothing(captioned: Path, base: DiffusionBase):
    """Entries belong to contents, not to names or places in the list."""
    _, before, mean = fill(captioned, base)
    for suffix in (".png", ".txt"):
        (captioned / f"0{suffix}").rename(captioned / f"z{suffix}")
    counts, after, moved = fill(captioned, base)
    assert misses(counts) == {}
    assert [picture.caption for picture in after.pictures] == ["b", "c", "d", "e", "a"]
    assert torch.equal(moved, mean[[1, 2, 3, 4, 0]])


def job(folder: Path, photos: Path, **data) -> Job:
    method = {"name": "lora", "rank": 2}
    train = {"batch_size": 3, "device": "cpu"}
    data = {"path": str(photos), "resolution": 16, **data}
    return Job.load({"base": str(folder), "domain": "diffusion", "method": method, "data": data, "train": train})


def test_latents_and_captions_stay_together_whether_cached_or_not(folder: Path, captioned: Path):
    """The defect of scripts that cache latents by step and shuffle captions anew."""
    pairs = []
    for _ in range(2):  # the second time, everything is in the cache
        task = prepare(job(folder, captioned))
        owner = {mean[0].numpy().tobytes(): "abcde"[i] for i, mean in enumerate(task.sources[0].mean)}
        order = ["abcde"[i] for i in range(5)]
        for step in range(10):
            batch = task.batch(step, torch.Generator().manual_seed(step))
            told = [order[int(batch.prompts[place])] for place in batch.prompt_of]
            assert [owner[mean.numpy().tobytes()] for mean in batch.mean] == told
            pairs.append(told)
    assert pairs[:10] == pairs[10:] and len({tuple(told) for told in pairs[:10]}) > 5


def test_latents_are_drawn_anew_at_every_step(folder: Path, photos: Path):
    for path in sorted(photos.glob("*.png"))[1:]:
        path.unlink()
    task = prepare(job(folder, photos))
    (mean,), (std,) = task.sources[0].mean[:, 0], task.sources[0].std[:, 0]
    assert bool((std > 0).all())
    drawn = []
    for step in range(200):
        batch = task.batch(step, torch.Generator().manual_seed(step))
        drawn.append(batch.mean + batch.std * batch.redraw)
    rows = torch.cat(drawn)
    assert len({row.numpy().tobytes() for row in rows}) == len(rows) == 600
    error = (rows.mean(0) - mean) / std * np.sqrt(600)
    assert float(error.abs().max()) < 5 and float((rows.std(0) / std - 1).abs().max()) < 0.15


@pytest.mark.slow
def test_variants_are_drawn_at_every_step_and_each_is_encoded_once(folder: Path, photos: Path):
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 400, 3), np.uint8)).save(photos / f"{i}.png")
    task = prepare(job(folder, photos, crop="random", flip=True, variants=3))
    source = task.sources[0]
    assert source.mean.shape[:2] == (5, 3)
    seen = set()
    for step in range(40):
        for mean in task.batch(step, torch.Generator().manual_seed(step)).mean:
            seen.add(tuple((source.mean == mean).flatten(2).all(2).nonzero()[0].tolist()))
    assert seen == {(i, k) for i in range(5) for k in range(3)}
    cache = Cache()
    load_dataset(DataConfig(path=str(photos), crop="random", flip=True, variants=3), 16, cache)
    assert misses(dict(cache.counts)) == {}


@pytest.mark.parametrize("wrong", [{"flip": True}, {"crop": "random"}])
def test_one_variant_cannot_vary(wrong: dict):
    with pytest.raises(InputError, match="the same at every step"):
        DataConfig(path="x", **wrong)
