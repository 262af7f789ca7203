"""Cutting and masking a picture: what is painted reaches the training, and everything can be taken back."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graft.app import desk, files, uploads
from graft.app.pages import teach
from graft.app.place import Place
from graft.studio.errors import InputError


@pytest.fixture
def place(tmp_path: Path, sprite: Path) -> Place:
    place = Place(tmp_path / "runs", tmp_path / "data", None)  # type: ignore[arg-type]
    name = place.new_set()
    uploads.add_files(place.data_set(name), [sprite, sprite])
    return place


def name_of(place: Place) -> str:
    (folder,) = place.data.iterdir()
    return folder.name


def painted(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A layer of the editor, with strokes in a box."""
    layer = Image.new("RGBA", size)
    layer.paste((255, 77, 109, 153), box)
    return layer


def test_what_is_painted_reaches_the_training(place: Place, tmp_path: Path) -> None:
    from graft.diffusion.data import DataConfig, load_dataset
    from graft.studio.caches import Cache

    folder = place.data_set(name_of(place))
    path = desk.found(place, folder.name, "0001.png")
    before = path.read_bytes()
    drawing = {"background": Image.open(path), "layers": [painted((64, 64), (0, 0, 32, 64))]}
    assert desk.save_drawing(folder, path, drawing)
    assert path.read_bytes() == before, "it was not cut"
    assert [path.name for path in uploads.pictures(folder)] == ["0001.png", "0002.png"], "a mask is no picture"
    assert "2 pictures" in teach.listing_of(place, folder.name)

    data = load_dataset(DataConfig(str(folder)), 64, Cache(tmp_path / "cache"))
    assert data.masks is not None and len(data.pictures) == 2
    marked = data.masks[0, 0, 0].numpy()
    assert (marked[:, :32] == 255).all() and (marked[:, 32:] == 0).all()
    assert (data.masks[1, 0, 0] == 255).all(), "without paint all of it is learnt"

    shown = desk.on_canvas(path)
    assert np.array_equal(np.array(shown["layers"][0].getchannel("A")) > 0, marked > 0)
    square = Image.open(BytesIO(files.square(path)))
    assert sum(square.getpixel((180, 10))) < sum(square.getpixel((10, 10)))  # type: ignore[arg-type]
    desk.save_drawing(folder, path, {**drawing, "layers": [Image.new("RGBA", (64, 64))]})
    assert not uploads.mask_file(path).exists(), "it was wiped away"


def test_a_cut_can_be_taken_back(place: Place) -> None:
    folder = place.data_set(name_of(place))
    path = desk.found(place, folder.name, "0002.png")
    before, address = path.read_bytes(), files.thumb_url(folder.name, "0002.png", path)
    for side in (40, 20):
        cut = {"background": Image.new("RGBA", (side, 24), "red"), "layers": [painted((side, 24), (0, 0, 8, 8))]}
        assert desk.save_drawing(folder, path, cut)
        assert Image.open(path).size == Image.open(uploads.mask_file(path)).size == (side, 24)
    assert files.thumb_url(folder.name, "0002.png", path) != address, "a browser would show the old one"
    assert len(desk.listed(place, folder.name)) == 2, "the original is no picture of the set"
    desk.take_back(folder, path)
    assert path.read_bytes() == before
    assert sorted(path.name for path in folder.rglob("*.*") if path.is_file()) == ["0001.png", "0002.png"]


def test_a_large_picture_keeps_its_pixels_under_a_mask(place: Place) -> None:
    folder = place.data_set(name_of(place))
    path = folder / "0001.png"
    Image.new("RGB", (4096, 1024), "teal").save(path)
    before, shown = path.read_bytes(), desk.on_canvas(path)
    assert shown["background"].size == (2048, 512)
    shown["layers"] = [painted((2048, 512), (0, 0, 1024, 512))]
    assert desk.save_drawing(folder, path, shown)
    assert path.read_bytes() == before
    assert Image.open(uploads.mask_file(path)).size == (4096, 1024)


def test_where_no_mask_is_read_none_is_written(place: Place) -> None:
    folder = place.data_set(name_of(place))
    path = folder / "0001.png"
    assert not desk.save_drawing(folder, path, {"layers": [painted((64, 64), (0, 0, 9, 9))]}, masks=False)
    assert not uploads.mask_file(path).exists()


@pytest.mark.parametrize("key", ["../x.png", "/etc/passwd", "0001.mask.png", ".originals/0001.png", "", None, "9.png"])
def test_pictures_are_looked_up(place: Place, key: str | None) -> None:
    with pytest.raises(InputError, match="there is no such picture"):
        desk.found(place, name_of(place), key)
