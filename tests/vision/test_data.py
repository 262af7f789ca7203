import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from graft.studio.caches import Cache
from graft.studio.errors import DataError, InputError
from graft.studio.labelled import built_in as datasets
from graft.studio.labelled.built_in import NAMES, built_in
from graft.studio.labelled.sources import open_source
from graft.studio.labelled.splits import make_split, read_split
from graft.vision.base import VisionBase
from graft.vision.data import DataConfig
from graft.vision.jobs import fit_data

CLASSES = ("across", "down", "slanted")


def split_of(path: Path | str, **settings):
    config = DataConfig(path=str(path), **settings)
    return make_split(open_source(config), config)


def fit(base: VisionBase, path: Path | str, **settings):
    return fit_data(DataConfig(path=str(path), **settings), base, Cache())


def counts(split, part: str) -> dict[str, int]:
    labels = [item.label for item in split.part(part)]
    return {label: labels.count(label) for label in split.classes}


def test_parts_of_a_folder_of_class_folders(photos: Path):
    split = split_of(photos)
    assert split.classes == CLASSES
    assert [set(counts(split, part).values()) for part in ("test", "val", "train")] == [{2}, {2}, {6}]
    parts = [{item.name for item in split.part(part)} for part in ("test", "val", "train")]
    assert len(set.union(*parts)) == 30


def test_validation_comes_out_of_the_shots_and_the_test_does_not_move(photos: Path):
    splits = [split_of(photos, shots=5, seed=seed) for seed in (0, 1)]
    for split in splits:
        assert set(counts(split, "val").values()) == {1} and set(counts(split, "train").values()) == {4}
        assert set(counts(split, "unused").values()) == {3}
    assert splits[0].part("test") == splits[1].part("test")
    assert splits[0].part("train") != splits[1].part("train")


def test_a_split_is_a_file_that_gives_itself_again(base: VisionBase, photos: Path, tmp_path: Path, draw):
    data = fit(base, photos, shots=4)
    (tmp_path / "split.jsonl").write_text(data.split.text)
    assert read_split(tmp_path / "split.jsonl") == data.split
    again = fit(base, photos, split=str(tmp_path / "split.jsonl"))
    assert again.split.digest == data.split.digest
    assert torch.equal(again.train.pixels, data.train.pixels)
    draw(0, 99).save(photos / data.train.names[0])
    with pytest.raises(DataError, match="not those of the split"):
        fit(base, photos, split=str(tmp_path / "split.jsonl"))
    (photos / data.train.names[0]).unlink()
    with pytest.raises(DataError, match="missing or have another label"):
        fit(base, photos, split=str(tmp_path / "split.jsonl"))
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="not a split file"):
        read_split(tmp_path / "other.jsonl")


def test_fit_cannot_see_the_test_pictures(base: VisionBase, photos: Path, monkeypatch: pytest.MonkeyPatch):
    """Every test picture is destroyed, and every file that is opened is written down: nothing changes."""
    before = fit(base, photos, seed=3)
    hidden = {str(photos / item.name) for item in before.split.part("test")}
    for name in hidden:
        Path(name).write_bytes(b"not a picture")
    opened: list[str] = []
    read = Path.read_bytes

    def noted(self: Path) -> bytes:
        opened.append(str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", noted)
    after = fit_data(DataConfig(path=str(photos), seed=3), base, Cache(photos.parent / "fresh"))
    assert torch.equal(after.train.pixels, before.train.pixels) and torch.equal(after.val.pixels, before.val.pixels)
    assert after.split.digest == before.split.digest
    used = {str(photos / item.name) for part in ("train", "val") for item in after.split.part(part)}
    assert used <= set(opened) and not hidden & set(opened)
    assert not any(after.split.digests.get(item.name) for item in after.split.part("test"))
    assert {len(after.train), len(after.val)} == {18, 6}


def test_declared_parts_are_kept(photos: Path, tmp_path: Path):
    root = tmp_path / "parts"
    for part, rows in (("Train", range(6)), ("valid", range(6, 8)), ("test", range(8, 10))):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for k in rows:
                (root / part / name / f"{k}.png").write_bytes((photos / name / f"{k}.png").read_bytes())
    split = split_of(root)
    assert [set(counts(split, part).values()) for part in ("train", "val", "test")] == [{6}, {2}, {2}]
    assert {item.name.split("/")[0] for item in split.part("test")} == {"test"}
    few = split_of(root, shots=4)
    assert [set(counts(few, part).values()) for part in ("train", "val")] == [{3}, {1}]
    assert all(item.name.startswith("Train") for item in few.part("val"))
    (root / "extra").mkdir()
    with pytest.raises(DataError, match="beside extra"):
        split_of(root)


def test_tables_arrays_and_hugging_face_tell_the_same(
    base: VisionBase, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    items = open_source(DataConfig(path=str(photos))).items
    pixels = np.stack([np.asarray(Image.open(photos / item.name)) for item in items])
    labels = np.array([CLASSES.index(item.label) for item in items])
    rows = [{"file_name": item.name, "label": item.label, "split": "train"} for item in items]
    (photos / "table.csv").write_text("File_Name,Label,Split\n" + "".join(",".join(r.values()) + "\n" for r in rows))
    (photos / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    np.savez(tmp_path / "pair.npz", images=pixels, labels=labels, classes=np.array(CLASSES))
    (tmp_path / "arrays").mkdir()
    for name, array in (("images", pixels), ("labels", labels), ("classes", np.array(CLASSES))):
        np.save(tmp_path / "arrays" / f"{name}.npy", array)
    np.savez(tmp_path / "floats.npz", x_train=pixels / 255.0, y_train=labels, x_test=pixels / 255.0, y_test=labels)
    fake = FakeDatasets(pixels, labels)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    expected = fit(base, photos, test=0.0, validation=0.0)
    for path in (photos / "table.csv", photos / "rows.jsonl", tmp_path / "pair.npz", tmp_path / "floats.npz",
                 tmp_path / "arrays", tmp_path / "saved"):  # fmt: skip
        found = fit(base, path, test=0.0, validation=0.0)
        order = np.argsort([pixels.tobytes() for pixels in found.train.pixels.numpy()])
        wanted = np.argsort([pixels.tobytes() for pixels in expected.train.pixels.numpy()])
        assert torch.equal(found.train.pixels[order], expected.train.pixels[wanted]), path.name
        assert torch.equal(found.train.labels[order], expected.train.labels[wanted]), path.name
    assert len(open_source(DataConfig(path=str(tmp_path / "floats.npz"))).items) == 60


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_pair_of_unequal_length_is_refused(tmp_path: Path, kind: str):
    images, labels = np.zeros((6, 8, 8), np.uint8), np.arange(5) % 2
    if kind == "file":
        np.savez(tmp_path / "pair.npz", images=images, labels=labels)
    else:
        np.save(tmp_path / "images.npy", images)
        np.save(tmp_path / "labels.npy", labels)
    path = tmp_path / "pair.npz" if kind == "file" else tmp_path
    with pytest.raises(DataError, match="it holds 6 pictures in images and 5 labels in labels"):
        open_source(DataConfig(path=str(path)))


class FakeDatasets:
    """What is used of Hugging Face's library."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray):
        class Part(list):
            features = {"image": object(), "label": SimpleNamespace(names=list(CLASSES))}

            def __getitem__(self, key):
                return [row["label"] for row in self] if key == "label" else super().__getitem__(key)

        rows = zip(pixels, labels.tolist(), strict=True)
        self.part = Part({"image": Image.fromarray(image), "label": label} for image, label in rows)

    def load_from_disk(self, path: str):
        return {"train": self.part}


def test_without_the_library_a_hugging_face_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="pip install datasets"):
        open_source(DataConfig(path=str(tmp_path)))


def test_pictures_of_every_mode_become_rgb(base: VisionBase, tmp_path: Path):
    """Grey, palette, 16 bits, CMYK, and transparent on the background that was asked for."""
    colour = Image.new("RGB", (40, 40), (200, 100, 50))
    clear = colour.convert("RGBA")
    clear.putalpha(0)
    pictures = {
        "a/grey.png": (colour.convert("L"), (124,) * 3),
        "a/palette.png": (colour.convert("P", palette=Image.Palette.ADAPTIVE), (200, 100, 50)),
        "a/deep.png": (Image.fromarray(np.full((40, 40), 124 * 256, dtype=np.uint16)), (124,) * 3),
        "b/ink.jpg": (colour.convert("CMYK"), (200, 100, 50)),
        "b/clear.png": (clear, (0, 0, 255)),
    }
    for name, (image, _) in pictures.items():
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "d" / name)
    data = fit(base, tmp_path / "d", test=0.0, validation=0.0, background="blue")
    for name, pixels in zip(data.train.names, data.train.pixels, strict=True):
        assert pixels.shape == (3, 32, 32)
        expected = torch.tensor(pictures[name][1]).view(3, 1, 1)
        assert (pixels.int() - expected).abs().max() <= 6, name


def test_one_picture_and_unequal_shots_are_used_and_told(photos: Path, caplog: pytest.LogCaptureFixture):
    for k in range(1, 10):
        (photos / "down" / f"{k}.png").unlink()
    split = split_of(photos, shots=6)
    assert counts(split, "train") == {"across": 5, "down": 1, "slanted": 5}
    assert counts(split, "val")["down"] == counts(split, "test")["down"] == 0
    assert "1 classes have one picture" in caplog.text and "down has 1" in caplog.text


def bad_folder(root: Path, kind: str, draw) -> None:
    match kind:
        case "empty class":
            (root / "none").mkdir()
        case "loose picture":
            draw(0, 0).save(root / "loose.png")
        case "same class":
            (root / "Down").mkdir()
            draw(0, 50).save(root / "Down" / "1.png")
        case "broken":
            (root / "down" / "3.png").write_bytes((root / "down" / "3.png").read_bytes()[:300])
            (root / "down" / "4.png").write_text("hello")
        case "two classes":
            (root / "down" / "77.png").write_bytes((root / "across" / "1.png").read_bytes())
        case "one class":
            for name in CLASSES[1:]:
                for path in (root / name).iterdir():
                    path.unlink()
                (root / name).rmdir()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("empty class", "class 'none' has no pictures"),
        ("loose picture", "loose.png lies in no class folder"),
        ("same class", "have the same name but for case"),
        ("broken", r"2 problems:\n  down/4.png: not a picture.*\n  down/3.png: image file is truncated"),
        ("two classes", "the same picture in two classes"),
        ("one class", "only the class 'across'"),
    ],
)
def test_bad_folders_are_refused_with_the_reason(base: VisionBase, photos: Path, kind: str, told: str, draw):
    bad_folder(photos, kind, draw)
    with pytest.raises(DataError, match=told):
        fit(base, photos, test=0.0, validation=0.0)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["down/1.png,down", "down/1.png,across"], "listed twice, as down and across"),
        (["down/99.png,down"], "line 2: there is no down/99.png"),
        (["../else.png,down"], "line 2: ../else.png lies outside"),
        (["down/1.png,"], "line 2: it lacks a label"),
        (["down/1.png,down,dusk"], "split 'dusk' is none of"),
    ],
)
def test_bad_tables_are_refused_with_the_line(photos: Path, lines: list[str], told: str):
    (photos / "t.csv").write_text("\n".join(["file,label,split", *lines]))
    with pytest.raises(DataError, match=told):
        open_source(DataConfig(path=str(photos / "t.csv")))


def test_the_same_row_twice_counts_once(photos: Path, caplog: pytest.LogCaptureFixture):
    (photos / "t.csv").write_text("file,label\ndown/1.png,down\ndown/1.png,down\nacross/1.png,across\n")
    assert len(open_source(DataConfig(path=str(photos / "t.csv"))).items) == 2
    assert "listed twice" in caplog.text


def test_settings_that_contradict_are_refused(photos: Path, tmp_path: Path):
    with pytest.raises(DataError, match="exactly one"):
        DataConfig()
    with pytest.raises(DataError, match="exactly one"):
        DataConfig(path="a", dataset="digits")
    with pytest.raises(DataError, match="data.test"):
        DataConfig(path="a", test=1.0)
    with pytest.raises(DataError, match="no such file"):
        open_source(DataConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="pocket-new"):
        open_source(DataConfig(dataset="pocket-now"))
    with pytest.raises(DataError, match="images of"):
        np.savez(tmp_path / "a.npz", images=np.zeros((4, 5)), labels=np.arange(4))
        source = open_source(DataConfig(path=str(tmp_path / "a.npz")))
        source.read(source.items[0].name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_built_in_sets_are_the_same_every_time_and_hold_every_class_in_both_parts(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(datasets, "TRAIN", 100)
    monkeypatch.setattr(datasets, "TEST", 60)
    datasets._drawn.cache_clear()
    source = built_in(name)
    parts = {part: [item for item in source.items if item.part == part] for part in ("train", "test")}
    assert {item.label for item in parts["train"]} == {item.label for item in parts["test"]}
    assert len({source.read(item.name).tobytes() for item in source.items}) == len(source.items)
    one = source.read("5").copy()
    datasets._drawn.cache_clear()
    assert np.array_equal(built_in(name).read("5"), one)
    datasets._drawn.cache_clear()


def test_digits_need_scikit_learn_and_say_so(monkeypatch: pytest.MonkeyPatch):
    images = np.arange(10 * 64).reshape(10, 8, 8) % 17.0
    fake = SimpleNamespace(load_digits=lambda: SimpleNamespace(images=images, target=np.arange(10) % 2))
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace(datasets=fake))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", fake)
    datasets._digits.cache_clear()
    source = built_in("digits")
    assert source.read("0").max() == 255 and source.read("0").shape == (8, 8)
    datasets._digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="drawn-digits"):
        built_in("digits")


def test_pixels_come_from_the_cache(base: VisionBase, photos: Path):
    cache = Cache()
    first = fit_data(DataConfig(path=str(photos)), base, cache)
    second = fit_data(DataConfig(path=str(photos), augment="flip"), base, cache)
    assert str(cache) == "vision 2 hits, 2 misses"
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert replace(second, augment="none").split == first.split
