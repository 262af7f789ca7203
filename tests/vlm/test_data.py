"""Bad folders are refused with the reason, odd pictures are read, and splits are files."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from graft.studio.errors import DataError
from graft.vlm.base import Preprocess
from graft.vlm.data import DataConfig, fit_data, labels_of, measured_data
from graft.vlm.pictures import load_view, to_pixels

SMALL = Preprocess(16, (0.5,) * 3, (0.5,) * 3)


def config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"path": str(root), **changes})


def names_of(examples: Any) -> set[str]:
    return {example.name for example in examples}


def shots(config: DataConfig) -> list[int]:
    return torch.bincount(labels_of(fit_data(config).train)).tolist()


def test_shots_are_drawn_by_the_seed_and_validation_comes_out_of_them(photos: Path):
    chosen = [names_of(fit_data(config(photos, shots=2, seed=seed)).train) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len(chosen[0]) == 6
    fit = fit_data(config(photos))  # six pictures of each class
    assert shots(config(photos)) == [4, 4, 4] and len(fit.validation) == 6
    assert not {e.digest for e in fit.train} & {e.digest for e in fit.validation}
    assert all(name.startswith("train/") for name in names_of(fit.train + fit.validation))
    assert [len(fit_data(config(photos, shots=n)).validation) for n in (1, 2, 4)] == [0, 0, 3]


def test_pictures_for_validation_are_used_where_the_data_has_them(photos: Path):
    shutil.copytree(photos / "test", photos / "val")
    for path in (photos / "val").rglob("*.png"):  # the same picture may not be in two parts
        Image.open(path).rotate(180).save(path)
    assert shots(config(photos)) == [6, 6, 6]
    assert {name.split("/")[0] for name in names_of(fit_data(config(photos)).validation)} == {"val"}


def test_a_fit_never_opens_test_pictures(photos: Path):
    for path in (photos / "test").rglob("*.png"):
        path.write_text("no picture at all")
    assert shots(config(photos)) == [4, 4, 4]
    with pytest.raises(DataError, match="6 problems"):
        measured_data(config(photos))


def test_halves_of_the_classes(photos: Path):
    assert fit_data(config(photos, classes="base")).names == ("cat", "dog")
    with pytest.raises(DataError, match="1 classes are too few"):
        fit_data(config(photos, classes="new"))


def test_a_plain_folder_puts_test_pictures_aside_and_a_split_file_says_which(photos: Path, tmp_path: Path):
    plain, file = photos / "train", tmp_path / "split.jsonl"
    fit = fit_data(config(plain, test=0.5))
    file.write_text(fit.split.text)
    names, test, known = measured_data(config(plain, split=str(file)))
    assert names == ("cat", "dog", "red cat") and len(test) == 9
    assert known is not None and names_of(known.train) == names_of(fit.train)
    assert not names_of(test) & names_of(fit.train + fit.validation)
    again = fit_data(config(plain, split=str(file)))
    assert again.digest == fit.digest
    assert len(measured_data(config(plain))[1]) == 18  # nothing declares a test: everything is measured


def test_built_in_sets_and_arrays_are_read_as_well(tmp_path: Path):
    fit = fit_data(DataConfig(dataset="pocket-count", shots=4))
    assert fit.names == ("1", "2", "3") and len(fit.train) == 9 and len(fit.validation) == 3
    assert load_view(fit.train[0], 0, SMALL, DataConfig(dataset="pocket-count")).shape == (3, 16, 16)
    np.savez(tmp_path / "a.npz", images=np.arange(8 * 100, dtype=np.uint8).reshape(8, 10, 10), labels=[0, 1] * 4)
    assert len(fit_data(config(tmp_path / "a.npz", test=0.0, validation=0.0)).train) == 8


def test_a_class_of_one_picture_and_unequal_shots_are_handled(photos: Path, caplog: pytest.LogCaptureFixture):
    for path in sorted((photos / "train" / "dog").iterdir())[1:]:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert shots(config(photos, shots=4)) == [3, 1, 3]
    assert "dog has 1" in caplog.text


def test_a_thousand_classes_with_two_of_one_name_are_refused(tmp_path: Path):
    for k in range(1000):
        (tmp_path / "data" / f"class_{k:04d}").mkdir(parents=True)
        Image.new("RGB", (8, 8), (k % 250, k // 250, 0)).save(tmp_path / "data" / f"class_{k:04d}" / "one.png")
    assert len(fit_data(config(tmp_path / "data")).names) == 1000
    (tmp_path / "data" / "names.json").write_text(json.dumps({"class_0017": "Crane", "class_0500": "crane"}))
    with pytest.raises(DataError, match="'class_0017' and 'class_0500' are both called 'crane'"):
        fit_data(config(tmp_path / "data", names="names.json"))


def test_every_problem_is_listed_at_once(photos: Path):
    (photos / "train" / "cat" / "bad.png").write_text("hello")
    Image.new("RGB", (4000, 4000)).save(photos / "train" / "dog" / "huge.png")
    with pytest.raises(DataError, match=r"(?s)bad.png: not a picture"):
        fit_data(config(photos, max_megapixels=1, validation=0.0))
    with pytest.raises(DataError, match="there is no such file or folder"):
        fit_data(config(photos / "missing"))
    (photos / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in class folders"):
        fit_data(config(photos / "empty"))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_pictures_of_any_mode_are_read(mode: str, photos: Path):
    grey = np.full((20, 20), 128, np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) << 8)
    elif mode in ("RGBA", "LA"):
        image = Image.fromarray(grey).convert(mode)
        image.putalpha(0)
    else:
        image = Image.fromarray(grey).convert(mode)
    path = photos / "train" / "cat" / ("odd.tif" if mode in ("CMYK", "I;16") else "odd.png")
    image.save(path)
    (example,) = [e for e in fit_data(config(photos, validation=0.0)).train if e.name == f"train/cat/{path.name}"]
    pixels = load_view(example, 0, SMALL, config(photos))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
    expected = 255 if mode in ("RGBA", "LA") else 128  # transparent: the background shows
    assert mode == "1" or (pixels.float() - expected).abs().max() <= 2


def test_views_are_crops_that_are_the_same_everywhere(photos: Path):
    example, data = fit_data(config(photos)).train[0], config(photos)
    views = [load_view(example, view, SMALL, data) for view in (0, 1, 2, 1)]
    assert torch.equal(views[1], views[3]) and not torch.equal(views[1], views[2])
    with Image.open(photos / example.name) as image:
        assert torch.equal(views[0], to_pixels(image, SMALL))


def test_a_truncated_picture_is_named_when_it_is_decoded(photos: Path):
    path = photos / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:400])
    example = next(e for e in fit_data(config(photos, validation=0.0)).train if e.name == "train/cat/0.png")
    with pytest.raises(DataError, match=r"0.png: it cannot be decoded"):
        load_view(example, 0, SMALL, config(photos))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"shots": -1}, "shots"), ({"crop": 0.0}, "crop"), ({"templates": ("a cat",)}, "templates"),
     ({"views": 999}, "views")],
)  # fmt: skip
def test_settings_are_checked(change: dict[str, Any], message: str):
    with pytest.raises(DataError, match=f"data.{message}"):
        DataConfig(**{"path": "x", **change})
