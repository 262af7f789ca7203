"""Published data sets in their own layout, and the measures and pictures of a classifier."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graft.studio.errors import DataError
from graft.studio.labelled.figures import class_accuracy, nearest, principal
from graft.studio.labelled.report import Known, Seen, write_report
from graft.studio.labelled.sources import LabelledConfig, open_source
from graft.studio.labelled.splits import make_split


def pictures(root: Path, *names: str) -> None:
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (k * 9, 0, 99)).save(root / name)


def parts(root: Path) -> dict[str, list[tuple[str, str]]]:
    config = LabelledConfig(path=str(root))
    split = make_split(open_source(config), config)
    return {part: sorted((i.name, i.label) for i in split.part(part)) for part in ("train", "val", "test")}


def test_few_shot_sets_keep_their_official_split(tmp_path: Path):
    """The layout of Caltech-101, as the authors of CoOp publish it: pictures lie in a folder below."""
    rows = {
        "train": [["cat/1.jpg", 0, "house cat"], ["dog/1.jpg", 1, "dog"]],
        "val": [["cat/2.jpg", 0, "house cat"]],
        "test": [["dog/2.jpg", 1, "dog"]],
    }
    (tmp_path / "split_zhou_Caltech101.json").write_text(json.dumps(rows))
    pictures(tmp_path / "101_ObjectCategories", "cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg", "extra/1.jpg")
    own = "101_ObjectCategories"
    assert parts(tmp_path) == {
        "train": [(f"{own}/cat/1.jpg", "house cat"), (f"{own}/dog/1.jpg", "dog")],
        "val": [(f"{own}/cat/2.jpg", "house cat")],
        "test": [(f"{own}/dog/2.jpg", "dog")],
    }
    (tmp_path / own / "dog" / "2.jpg").unlink()
    with pytest.raises(DataError, match="there is no 101_ObjectCategories/dog/2.jpg"):
        parts(tmp_path)
    (tmp_path / "split_zhou_Caltech101.json").write_text('{"train": [["../../x.jpg", 0, "cat"]]}')
    with pytest.raises(DataError, match="lies outside"):
        parts(tmp_path)
    (tmp_path / "split_zhou_Caltech101.json").write_text("[]")
    with pytest.raises(DataError, match="expected"):
        parts(tmp_path)


@pytest.mark.parametrize(
    ("name", "below", "file"),
    [
        ("Caltech101", "101_ObjectCategories", "accordion/image_0001.jpg"),
        ("OxfordPets", "images", "Abyssinian_1.jpg"),
        ("StanfordCars", "", "cars_train/00001.jpg"),
        ("OxfordFlowers", "jpg", "image_00001.jpg"),
        ("Food101", "images", "apple_pie/1005649.jpg"),
        ("SUN397", "SUN397", "a/abbey/sun_aaalbzqrimafwbiv.jpg"),
        ("DescribableTextures", "images", "banded/banded_0002.jpg"),
        ("EuroSAT", "2750", "AnnualCrop/AnnualCrop_1.jpg"),
        ("UCF101", "UCF-101-midframes", "Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c01.jpg"),
    ],
)
def test_nine_sets_lie_where_their_authors_put_them(tmp_path: Path, name: str, below: str, file: str):
    """FGVC-Aircraft and ImageNet, which have lists of their own, are the other two of the eleven."""
    other = f"{Path(file).parent.as_posix()}/other.jpg".removeprefix("./")
    table = {"train": [[file, 0, "first"], [other, 1, "second"]], "val": [], "test": []}
    (tmp_path / f"split_zhou_{name}.json").write_text(json.dumps(table))
    (tmp_path / "annotations").mkdir()  # what lies beside the pictures is passed over
    pictures(tmp_path / below, file, other)
    where = f"{below}/" if below else ""
    assert dict(parts(tmp_path)["train"]) == {f"{where}{file}": "first", f"{where}{other}": "second"}


def test_aircraft_and_imagenet_keep_theirs(tmp_path: Path):
    planes = tmp_path / "fgvc_aircraft"
    pictures(planes, "images/01.jpg", "images/02.jpg", "images/03.jpg", "images/04.jpg")
    for part, lines in {"train": "01 707-320\n03 A320\n", "val": "02 A320\n", "test": "04 707-320\n"}.items():
        (planes / f"images_variant_{part}.txt").write_text(lines)
    assert parts(planes)["train"] == [("images/01.jpg", "707-320"), ("images/03.jpg", "A320")]
    assert parts(planes)["test"] == [("images/04.jpg", "707-320")]
    net = tmp_path / "imagenet"
    folders = {"n01": "tench", "n02": "crane", "n03": "crane"}
    pictures(net, *(f"images/{part}/{folder}/a.jpg" for part in ("train", "val") for folder in folders))
    (net / "classnames.txt").write_text("".join(f"{folder} {name}\n" for folder, name in folders.items()))
    config = LabelledConfig(path=str(net))
    split = make_split(open_source(config), config)
    assert split.classes == ("crane (n02)", "crane (n03)", "tench")  # ImageNet has two cranes
    assert len(split.part("test")) == 3 and all("val" in item.name for item in split.part("test"))


def test_vtab_is_trained_on_its_thousand(tmp_path: Path):
    names = [f"images/train/{k}.jpg" for k in range(4)] + ["images/test/0.jpg"]
    pictures(tmp_path, *names)
    lines = [f"{name} {k % 2}" for k, name in enumerate(names)]
    (tmp_path / "train800val200.txt").write_text("\n".join(lines[:4]))
    (tmp_path / "test.txt").write_text(lines[4])
    config = LabelledConfig(path=str(tmp_path), validation=0.0)
    split = make_split(open_source(config), config)
    assert [len(split.part(part)) for part in ("train", "val", "test")] == [4, 0, 1]
    (tmp_path / "train800.txt").write_text("\n".join(lines[:2]))
    (tmp_path / "val200.txt").write_text("\n".join(lines[2:4]))
    assert {part: len(found) for part, found in parts(tmp_path).items()} == {"train": 2, "val": 2, "test": 1}


def test_measures():
    logits = torch.tensor([[4.0, 0], [4, 0], [0, 4], [4, 0], [0, 4], [4, 0]])
    assert class_accuracy(logits, torch.tensor([0, 0, 0, 0, 1, 1])).tolist() == [0.75, 0.5]
    points = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5, 1, 1, 0.5, 0.1])
    places = principal(points)
    values, vectors = np.linalg.eigh(np.cov(points.double().numpy().T))
    assert torch.allclose(places.var(0).double(), torch.tensor(values[::-1][:2].copy()), rtol=1e-4)
    wanted = (points - points.mean(0)).double().numpy() @ vectors[:, ::-1][:, :2]
    assert np.allclose(np.abs(places.numpy()), np.abs(wanted), atol=1e-4)
    found, likeness = nearest(points[:3] * 7, points, 2)
    assert found[:, 0].tolist() == [0, 1, 2] and torch.allclose(likeness[:, 0], torch.ones(3))


def test_a_report_draws_the_map_and_the_neighbours(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 3
    features = torch.nn.functional.one_hot(labels, 8).float() + 0.1 * torch.randn(12, 8, generator=generator)
    pixels = torch.randint(0, 256, (12, 3, 20, 20), generator=generator, dtype=torch.uint8)
    logits = 9 * features[:, :3]
    logits[0] = torch.tensor([0.0, 9, 0])  # one surely wrong
    known = Known(features[3:], labels[3:], lambda rows: pixels[3:][list(rows)])
    seen = Seen([str(k) for k in range(12)], labels, logits, ("a", "b", "c"), lambda rows: pixels[list(rows)],
                features, known)  # fmt: skip
    write_report(tmp_path, seen)
    names = {"confusion", "reliability", "mistakes", "map", "neighbours"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    with Image.open(tmp_path / "map.png") as drawn:
        assert {(31, 122, 84), (194, 65, 12), (37, 99, 235)} <= set(drawn.get_flattened_data())
    with Image.open(tmp_path / "neighbours.png") as drawn:
        assert drawn.size == (6 * 102 + 18, 8 * 116 + 6)
    assert "0,a,b" in (tmp_path / "predictions.csv").read_text()
    assert (tmp_path / "classes.csv").read_text().splitlines()[1].startswith("a,4,3,0.7500,b")
