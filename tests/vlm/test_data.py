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
from graft.vlm.data import DataConfig, read_split, read_test, write_splits
from graft.vlm.pictures import load_view, to_pixels

SMALL = Preprocess(16, (0.5,) * 3, (0.5,) * 3)


def config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"path": str(root), **changes})


def test_shots_are_a_function_of_seed_and_class(photos: Path):
    chosen = [[e.path for e in read_split(config(photos, shots=2, seed=seed)).train] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert read_split(config(photos, shots=2)).shots == [2, 2, 2]
    shutil.copytree(
        photos / "train" / "cat", photos / "train" / "aardvark"
    )  # another class moves no shot of the others
    kept = {e.path for e in read_split(config(photos, shots=2)).train if "aardvark" not in e.path.parts}
    assert kept == set(chosen[0])


def test_validation_comes_out_of_the_shots(photos: Path):
    split = read_split(config(photos))
    assert split.shots == [5, 5, 5] and len(split.validation) == 3
    assert not {e.digest for e in split.train} & {e.digest for e in split.validation}
    assert all("train" in e.path.parts for e in split.validation)
    assert len(read_split(config(photos, shots=3)).validation) == 0  # too few to spare one
    assert read_split(config(photos, shots=1, validation=1)).shots == [1, 1, 1]  # never the last
    assert read_split(config(photos, validation=2)).shots == [4, 4, 4]


def test_pictures_for_validation_are_used_where_the_data_has_them(photos: Path):
    shutil.copytree(photos / "test", photos / "val")
    split = read_split(config(photos))
    assert split.shots == [6, 6, 6] and {e.path.parts[-3] for e in split.validation} == {"val"}


def test_a_split_never_opens_test_pictures(photos: Path):
    for path in (photos / "test").rglob("*.png"):
        path.write_text("no picture at all")
    assert read_split(config(photos)).shots == [5, 5, 5]
    with pytest.raises(DataError, match="6 problems"):
        read_test(config(photos))


def test_halves_of_the_classes(photos: Path):
    assert read_split(config(photos, classes="base")).names == ("cat", "dog")
    with pytest.raises(DataError, match="1 classes are too few"):
        read_split(config(photos, classes="new"))


def test_splits_are_a_file_with_hashes(photos: Path):
    plain = photos / "train"
    counts = write_splits(config(plain), 0.5, plain / "splits.jsonl")
    assert counts == {"train": 9, "test": 9}
    rows = [json.loads(line) for line in (plain / "splits.jsonl").read_text().splitlines()]
    assert {len(row["sha256"]) for row in rows} == {64}
    names, test = read_test(config(plain))
    train = read_split(config(plain)).train
    assert names == ("cat", "dog", "red cat") and len(test) == 9
    assert not {e.path for e in train} & {e.path for e in test}
    (plain / "splits.jsonl").write_text('{"path": "../../secret.png", "class": "cat", "split": "train"}\n')
    with pytest.raises(DataError, match="leads out of the folder"):
        read_split(config(plain))
    (plain / "splits.jsonl").write_text("cat\n")
    with pytest.raises(DataError, match=r"splits.jsonl:1: it is not a line of splits"):
        read_split(config(plain))
    with pytest.raises(DataError, match="there is no such file of splits"):
        read_split(config(plain, splits="other.jsonl"))


def test_a_class_of_one_picture_and_unequal_shots_are_handled(photos: Path, caplog: pytest.LogCaptureFixture):
    for path in sorted((photos / "train" / "dog").iterdir())[1:]:
        path.unlink()
    with caplog.at_level(logging.WARNING, "graft"):
        split = read_split(config(photos, shots=4))
    assert split.shots == [3, 1, 3]
    assert "classes have 1 to 3 training pictures" in caplog.text


def test_a_thousand_classes_with_two_of_one_name_are_refused(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    for k in range(1000):
        (tmp_path / "data" / f"class_{k:04d}").mkdir(parents=True)
        (tmp_path / "data" / f"class_{k:04d}" / "one.png").hardlink_to(tmp_path / "one.png")
    assert len(read_split(config(tmp_path / "data")).names) == 1000
    (tmp_path / "data" / "names.json").write_text(json.dumps({"class_0017": "Crane", "class_0500": "crane"}))
    with pytest.raises(DataError, match="'class_0017' and 'class_0500' are both called 'crane'"):
        read_split(config(tmp_path / "data", names="names.json"))


def test_every_problem_is_listed_at_once(photos: Path):
    (photos / "train" / "cat" / "bad.png").write_text("hello")
    Image.new("RGB", (4000, 4000)).save(photos / "train" / "dog" / "huge.png")
    with pytest.raises(DataError, match=r"(?s)2 problems.*bad.png: not a picture.*huge.png: 4,000 x 4,000 pixels"):
        read_split(config(photos, max_megapixels=1))
    with pytest.raises(DataError, match="there is no such folder"):
        read_split(config(photos / "missing"))
    (photos / "empty").mkdir()
    with pytest.raises(DataError, match="no folders of pictures"):
        read_split(config(photos / "empty"))


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
    (example,) = [e for e in read_split(config(photos, validation=0)).train if e.path == path]
    pixels = load_view(example, 0, SMALL, config(photos))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
    expected = 255 if mode in ("RGBA", "LA") else 128  # transparent: the background shows
    assert mode == "1" or (pixels.float() - expected).abs().max() <= 2


def test_views_are_crops_that_are_the_same_everywhere(photos: Path):
    example, data = read_split(config(photos)).train[0], config(photos)
    views = [load_view(example, view, SMALL, data) for view in (0, 1, 2, 1)]
    assert torch.equal(views[1], views[3]) and not torch.equal(views[1], views[2])
    with Image.open(example.path) as image:
        assert torch.equal(views[0], to_pixels(image, SMALL))


def test_a_truncated_picture_is_named_when_it_is_decoded(photos: Path):
    path = photos / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:400])
    example = next(e for e in read_split(config(photos, validation=0)).train if e.path == path)
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
