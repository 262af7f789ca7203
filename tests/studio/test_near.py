"""The known pictures nearest to those asked about, against cosines of numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from graft.studio.job import Job
from graft.studio.labelled import near as module
from graft.studio.labelled.near import near
from graft.studio.runs import create_run
from graft.studio.shown import Asked

SHADES = {"dark": ((10, 0, 30), (60, 20, 10)), "bright": ((250, 200, 90), (180, 255, 220), (90, 250, 250))}


@pytest.fixture
def known(tmp_path: Path) -> list[str]:
    """One colour each, in folders by class."""
    for name, shades in SHADES.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for k, shade in enumerate(shades):
            Image.new("RGB", (12, 9), shade).save(tmp_path / "data" / name / f"{k}.png")
    return sorted(map(str, (tmp_path / "data").rglob("*.png")))


def read(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


def encode(pixels: Tensor) -> Tensor:
    return pixels.float().mean((2, 3))


def test_the_nearest_are_shown_with_their_classes(known: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BATCH", 2)
    Image.new("RGB", (20, 20), (200, 40, 20)).save(tmp_path / "asked.png")
    broken = tmp_path / "data" / "dark" / "9.png"
    broken.write_bytes(b"no picture")
    asked = Asked(pictures=(str(tmp_path / "asked.png"),), known=(*known, str(broken), str(tmp_path / "gone.png")))
    (cell,) = near(asked, tmp_path / "out", read, encode)
    there = np.array([shade for name in sorted(SHADES) for shade in SHADES[name]], float)
    own = np.array([200, 40, 20.0])
    cosines = there @ own / np.linalg.norm(there, axis=1) / np.linalg.norm(own)
    names = [name for name in sorted(SHADES) for _ in SHADES[name]]
    best = np.argsort(-cosines)[: module.COUNT]
    assert cell.text == ", ".join(f"{names[k]} {cosines[k]:.2f}" for k in best)
    assert (cell.row, cell.shares) == ("asked.png", {})
    with Image.open(cell.picture) as strip:
        middles = [strip.getpixel((module.TILE * k + 48, 48)) for k in range(module.COUNT)]
    assert middles == [tuple(map(int, there[k])) for k in best]


def test_nothing_known_shows_nothing(known: list[str], tmp_path: Path):
    for lost in ((), (str(tmp_path / "gone.png"),)):
        assert near(Asked(pictures=(known[0],), known=lost), tmp_path, read, encode) == []


def test_many_known_pictures_are_spread_evenly(known: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST", 2)
    (cell,) = near(Asked(pictures=(known[2],), known=tuple(known)), tmp_path, read, encode)
    assert [part.split()[0] for part in cell.text.split(", ")] == ["bright", "dark"]  # the first and the last


def test_known_are_the_pictures_of_the_run(known: list[str], tmp_path: Path):
    from graft.app.worker import known_of

    data = {"there": {"path": str(tmp_path / "data")}, "gone": {"path": "gone"}, "none": {"dataset": "pocket-new"}}
    found = {
        name: known_of(create_run(Job("pocket-vit", {"name": "linear"}, told, "vision"), tmp_path / name))
        for name, told in data.items()
    }
    assert found == {"there": known, "gone": [], "none": []}
