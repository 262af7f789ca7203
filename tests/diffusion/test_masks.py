"""Masks: what counts in the loss, and Custom Diffusion's rescaling, whose canvas does not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graft.diffusion.base import load_base
from graft.diffusion.data import DataConfig, load_buckets, load_dataset, loss_weights
from graft.diffusion.jobs import prepare
from graft.diffusion.objectives import weighted_mse
from graft.diffusion.variants import FAR, NEAR, Variant, rescaling, reworded
from graft.studio.caches import Cache
from graft.studio.errors import DataError, InputError
from graft.studio.job import Job

LORA = {"name": "lora", "rank": 2}


def job(folder: Path, photos: Path, method: dict | None = None, **data) -> Job:
    train = {"batch_size": 2, "device": "cpu", "mixed_precision": "no"}
    data = {"path": str(photos), "resolution": 16, **data}
    return Job.load(
        {"base": str(folder), "domain": "diffusion", "method": method or LORA, "data": data, "train": train}
    )


def half(photos: Path, name: str, left: int = 255, right: int = 0) -> None:
    """A mask of 24 x 16 pixels, like the pictures: the crop of 16 x 16 is half left and half right."""
    mask = np.full((16, 24), right, np.uint8)
    mask[:, :12] = left
    (photos / name).parent.mkdir(exist_ok=True)
    Image.fromarray(mask).save(photos / name)


def test_the_loss_is_the_mean_over_what_counts():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 5, 5, generator=generator)
    places = torch.rand(3, 1, 5, 5, generator=generator)
    weights = torch.tensor([1.0, 2.0, 0.5])
    expected = [
        w * (m * (p - t) ** 2).sum() / (m.sum() * len(p))
        for p, t, m, w in zip(prediction, target, places, weights, strict=True)
    ]
    torch.testing.assert_close(weighted_mse(prediction, target, weights, places), torch.stack(expected))
    plain = weighted_mse(prediction, target, weights)
    assert torch.equal(weighted_mse(prediction, target, weights, torch.ones(3, 1, 5, 5)), plain)
    assert torch.equal(weighted_mse(prediction, target, weights, torch.zeros(3, 1, 5, 5)), torch.zeros(3))


@pytest.mark.parametrize("name", ["0.mask.png", pytest.param("masks/0.jpg", marks=pytest.mark.slow)])
def test_a_mask_beside_a_picture_weighs_its_latents(folder: Path, photos: Path, name: str):
    half(photos, name)
    task = prepare(job(folder, photos, mask_outside=0.25))
    (source,) = task.sources
    assert len(source.mean) == 5 and source.places is not None  # a mask is no picture
    assert source.places[0, 0, 0].tolist() == pytest.approx(np.array([[1.0] * 4 + [0.25] * 4] * 8), abs=0.02)
    assert source.places[1:].unique().tolist() == [1.0]
    for step in range(3):
        batch = task.batch(step, torch.Generator().manual_seed(step))
        rows = [int((source.mean[:, 0] == mean).flatten(1).all(1).nonzero()) for mean in batch.mean]
        assert batch.places is not None and torch.equal(batch.places, source.places[rows, 0])


def test_a_masked_step_is_the_formula(folder: Path, photos: Path):
    for i in range(5):
        half(photos, f"masks/{i}.png")
    task = prepare(job(folder, photos))
    batch, pipe = task.batch(0, torch.Generator().manual_seed(1)), task.base.pipe
    x0 = batch.mean + batch.std * batch.redraw
    noisy = pipe.scheduler.add_noise(x0, batch.noise, batch.levels)
    texts = task.encode(batch.prompts)["text"][batch.prompt_of]
    errors = (pipe.unet(noisy, batch.levels, texts).sample - batch.noise).square()
    torch.testing.assert_close(task(batch)[0], errors[..., :4].mean(), rtol=1e-5, atol=1e-6)


def test_a_white_mask_changes_nothing(folder: Path, photos: Path):
    plain = prepare(job(folder, photos))
    for i in range(5):
        half(photos, f"{i}.mask.png", 255, 255)
    white = prepare(job(folder, photos))
    one, two = (task.batch(0, torch.Generator().manual_seed(1)) for task in (plain, white))
    assert one.places is None and two.places is not None and torch.equal(plain(one)[0], white(two)[0])
    assert prepare(job(folder, photos, mask="off")).sources[0].places is None


def test_alpha_is_a_mask_and_never_black(folder: Path, photos: Path):
    pixels = np.full((16, 16, 4), 200, np.uint8)
    pixels[:, :8, 3], pixels[:, 8:, 3] = 255, 0
    for path in photos.glob("*.png"):
        path.unlink()
    Image.fromarray(pixels).save(photos / "clear.png")
    Image.fromarray(pixels).convert("RGB").save(photos / "plain.png")
    dataset = load_dataset(DataConfig(path=str(photos), mask="alpha"), 16, Cache())
    assert dataset.pixels[0, 0, :, :, 8:].unique().tolist() == [255]  # the background, white
    assert dataset.masks is not None
    assert dataset.masks[0, 0, 0, 0].tolist() == [255] * 8 + [0] * 8
    assert dataset.masks[1].unique().tolist() == [255]
    assert prepare(job(folder, photos)).sources[0].places is None  # unless it is asked for


@pytest.mark.slow
def test_masks_follow_crop_mirror_and_orientation(tmp_path: Path):
    picture = np.zeros((40, 64, 3), np.uint8)
    picture[10:30, 20:40] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(picture[..., 0]).save(tmp_path / "a.mask.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(picture)).save(tmp_path / "turned.png", exif=exif)  # upright it is the first one
    Image.fromarray(picture[..., 0]).save(tmp_path / "turned.mask.png")
    config = DataConfig(path=str(tmp_path), crop="random", flip=True, variants=4, buckets=True)
    for rescale in (False, True):
        (dataset,) = load_buckets(config, 32, 8, Cache(), rescale)
        assert dataset.masks is not None and len(dataset.pictures) == 2
        marked = dataset.masks[:, :, 0] > 127
        covered = dataset.masks[:, :, 1] > 0
        assert bool(((dataset.pixels[:, :, 0] > 127) & covered == marked).float().mean() > 0.97)


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("0.mask.png", Image.new("L", (16, 24)), "its mask 0.mask.png is 16 x 24 pixels, the picture 24 x 16"),
        ("masks/0.png", Image.new("L", (24, 16)), "its mask 0.png is black all over"),
        ("masks/9.png", Image.new("L", (24, 16), 255), "masks/9.png: there is no picture of this name"),
        ("9.mask.png", Image.new("L", (24, 16), 255), "9.mask.png: there is no picture of this name"),
    ],
)
def test_a_mask_that_cannot_be_meant_is_refused(photos: Path, name: str, mask: Image.Image, message: str):
    (photos / name).parent.mkdir(exist_ok=True)
    mask.save(photos / name)
    with pytest.raises(DataError, match=message):
        load_dataset(DataConfig(path=str(photos)), 16, Cache())


def test_a_mask_changes_the_digest(photos: Path):
    digests = set()
    for left in (255, 200):
        half(photos, "0.mask.png", left)
        digests.add(load_dataset(DataConfig(path=str(photos)), 16, Cache()).digest)
    digests.add(load_dataset(DataConfig(path=str(photos), mask="off"), 16, Cache()).digest)
    assert len(digests) == 3


def test_rescaled_variants_are_the_authors_recipe():
    found = [rescaling(f"{i:016x}", k) for i in range(400) for k in range(3)]
    small, large = [r for r in found if r.scale <= 1], [r for r in found if r.scale > 1]
    assert len(small) == 2 * len(large)  # 0.66 of the pictures in the authors' code
    assert all(1 / 3 <= r.scale <= 1 for r in small) and all(1.2 <= r.scale <= 1.4 for r in large)
    assert {r.wording for r in small if r.scale < 0.6} == set(FAR) and {r.wording for r in large} == set(NEAR)
    assert {r.wording for r in small if r.scale >= 0.6} == {"{}"}
    assert reworded("a photo of <new1> cat", FAR[0]) == "a far away photo of <new1> cat"
    assert reworded("a photo of <new1> cat", "{}") == "a photo of <new1> cat"


def test_a_small_picture_lies_on_grey_and_a_large_one_is_zoomed_in():
    y, x = np.mgrid[:48, :48]
    image = Image.fromarray(np.stack([x * 5, y * 5, x * 0], -1).astype(np.uint8))
    for i in range(40):
        way = Variant((48, 48), rescaling=rescaling(f"{i:016x}", i))
        assert way.rescaling is not None
        pixels, cover = np.asarray(way.cut(image)), np.asarray(way.covered()) > 0
        if way.rescaling.scale <= 1:
            assert cover.sum() == round(48 * way.rescaling.scale) ** 2
            assert (pixels[~cover] == 128).all() and (pixels[cover][:, 2] == 0).all()
        else:
            edge = 48 / way.rescaling.scale
            assert cover.all() and abs(int(pixels[0, 0, 0]) - (48 - edge) / 2 * 5) < 6


def test_latents_on_the_canvas_count_nothing():
    masks = torch.zeros(1, 2, 2, 16, 16, dtype=torch.uint8)
    masks[0, 0, :, 1:9, 4:14] = 255
    masks[0, 1, :, 1:3, 1:3] = 255  # smaller than one latent
    weights = loss_weights(masks, (8, 8), 1.0)
    expected = torch.zeros(8, 8)
    expected[1:4, 2:7] = 1
    assert torch.equal(weights[0, 0, 0], expected)
    assert weights[0, 1, 0, :2, :2].tolist() == [[0.25, 0.25], [0.25, 0.25]] and weights[0, 1].sum() == 1


@pytest.mark.slow
def test_custom_diffusion_trains_on_rescaled_pictures(folder: Path, photos: Path):
    method = {"name": "custom_diffusion", "token": "<cat>", "augment": True}
    with pytest.raises(InputError, match=r"Set data.variants"):
        prepare(job(folder, photos, method))
    task = prepare(job(folder, photos, method, variants=6))
    (source,) = task.sources
    assert source.wording is not None and source.places is not None and source.mean.shape[1] == 6
    texts = {row: text for text, row in _rows(task).items()}
    dataset, told = task.subjects[0].dataset, set()
    for step in range(12):
        batch = task.batch(step, torch.Generator().manual_seed(step))
        assert batch.places is not None
        for mean, places, place in zip(batch.mean, batch.places, batch.prompt_of, strict=True):
            i, k = (source.mean == mean).flatten(2).all(2).nonzero()[0].tolist()
            way = rescaling(dataset.keys[i][k], k)
            prompt = texts[int(batch.prompts[place])]
            assert any(prompt.startswith(word.split("{")[0]) for word in (way.wording,))
            assert torch.equal(places, source.places[i, k]) and (way.scale > 1) == bool((places == 1).all())
            told.add(way.wording)
        assert bool(task(batch)[0].isfinite())
    assert len(told) >= 4  # variants are drawn step by step, not once


def _rows(task) -> dict[str, int]:
    """Prompts by their row, found again by adding them in the order in which the method does."""
    from graft.diffusion.method import PromptTable, all_sources

    table, subject = PromptTable(), task.subjects[0]
    list(all_sources(load_base(subject.job.base, "cpu"), subject, 0, table, Cache()))
    return {text: row for row, (_, text) in enumerate(table.entries)}
