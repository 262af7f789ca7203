"""`graft data doctor`: every kind of finding, the shapes, and a contact sheet of what is trained on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from graft.diffusion.data import DataConfig, load_dataset
from graft.diffusion.doctor import CLIP_TOKENS, KINDS, TILE, examine
from graft.studio.caches import Cache
from graft.studio.cli import main
from graft.studio.config import write_toml


def noise(seed: int, height: int = 80, width: int = 80) -> np.ndarray:
    """A picture with some structure, so that hashes of two of them differ."""
    small = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    """A folder with one case of everything."""
    path = tmp_path / "ward"
    (path / "masks").mkdir(parents=True)
    Image.fromarray(noise(0)).save(path / "fine.png")
    (path / "fine.txt").write_text("a sks cat")
    (path / "fine-again.png").write_bytes((path / "fine.png").read_bytes())
    Image.fromarray(noise(0)).resize((72, 72)).save(path / "fine-smaller.jpg", quality=80)
    Image.fromarray(noise(1, 20, 24)).save(path / "tiny.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(2)).save(path / "turned.jpg", exif=exif)
    Image.fromarray(np.dstack([noise(3), np.full((80, 80, 1), 9, np.uint8)])).save(path / "clear.png")
    Image.fromarray(noise(4)).convert("L").save(path / "grey.png")
    Image.fromarray(noise(5)).convert("CMYK").save(path / "print.jpg")
    Image.fromarray(noise(6, 80, 240)).save(path / "panorama.png")
    (path / "letter.png").write_text("dear reader")
    whole = (path / "turned.jpg").read_bytes()
    (path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (path / "panorama.txt").write_text(", ".join(["a long word"] * 40))
    (path / "tiny.txt").write_text(" \n")
    (path / "grey.txt").write_bytes(b"caf\xe9")
    (path / "turned.txt").write_text("a picture without the word")
    (path / "nobody.txt").write_text("a caption of nothing")
    Image.new("L", (80, 80)).save(path / "masks" / "clear.png")
    frames = [Image.fromarray(noise(seed)) for seed in (7, 8)]
    frames[0].save(path / "film.gif", save_all=True, append_images=frames[1:])
    return path


def test_every_kind_of_finding(ward: Path):
    report = examine(DataConfig(path=str(ward), resolution=64), triggers=("sks",))
    assert {kind: sorted(files) for kind, files in report.found.items()} == {
        "unreadable": ["cut.jpg", "letter.png"],
        "bad caption file": ["grey.txt"],
        "bad mask": ["masks/clear.png"],
        "duplicate": ["fine.png"],
        "near duplicate": ["fine-smaller.jpg"],
        "small": ["tiny.png"],
        "much is cut off": ["panorama.png"],
        "empty caption": ["tiny.png"],
        "caption cut off": ["panorama.png"],
        "trigger missing": ["panorama.png", "turned.jpg"],
        "no caption": ["clear.png", "film.gif", "fine-again.png", "fine-smaller.jpg", "grey.png", "print.jpg"],
        "caption without picture": ["nobody.txt"],
        "turned by EXIF": ["turned.jpg"],
        "transparent": ["clear.png"],
        "grey": ["grey.png"],
        "CMYK": ["print.jpg"],
        "animated": ["film.gif"],
    }
    assert set(report.found) == set(KINDS)
    assert "truncated" in report.found["unreadable"]["cut.jpg"]
    assert report.found["duplicate"]["fine.png"] == "the same file as fine-again.png"
    assert report.found["near duplicate"]["fine-smaller.jpg"] == "looks like fine-again.png"
    assert report.found["bad mask"]["masks/clear.png"] == "is black all over: nothing would be learnt"
    assert f"{CLIP_TOKENS} tokens are read" in report.found["caption cut off"]["panorama.png"]
    assert (report.pictures, report.captions, report.masks) == (10, 3, 0)


def test_a_huge_picture_is_found_from_its_header(ward: Path):
    report = examine(DataConfig(path=str(ward), resolution=64, max_megapixels=0.018))
    told = report.found["unreadable"]["panorama.png"]
    assert told == "240 x 80 pixels, above data.max_megapixels = 0.018"


def test_sound_pictures_are_not_accused(tmp_path: Path):
    for i in range(12):
        Image.fromarray(noise(i)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    report = examine(DataConfig(path=str(tmp_path), resolution=64))
    assert report.found == {} and "Nothing is wrong." in report.text()


def test_shapes_are_counted_with_what_is_cut_off(ward: Path):
    def rows(**settings: Any) -> list[tuple[int, int, int]]:
        shapes = examine(DataConfig(path=str(ward), resolution=64, **settings)).shapes
        return [(row["width"], row["height"], row["pictures"]) for row in shapes]

    assert rows() == [(64, 64, 10)]
    assert rows(buckets=True) == [(64, 64, 8), (88, 48, 1), (72, 56, 1)]
    report = examine(DataConfig(path=str(ward), resolution=64, buckets=True))
    cut = {(row["width"], row["height"]): row["cut"] for row in report.shapes}
    assert cut[88, 48] == pytest.approx(1 - 88 / 48 / 3, abs=1e-3)


def test_the_sheet_shows_what_is_trained_on(tmp_path: Path):
    path = tmp_path / "photos"
    path.mkdir()
    for i in range(3):
        Image.fromarray(noise(i, 80, 120)).save(path / f"{i}.png")
    config = DataConfig(path=str(path), resolution=TILE, crop="random", flip=True, variants=2)
    report = examine(config, out=tmp_path / "out" / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    dataset = load_dataset(config, 0, Cache())
    for place, pixels in enumerate(dataset.pixels.flatten(0, 1)):
        left = 6 + place * (TILE + 6)
        assert np.array_equal(sheet[6 : 6 + TILE, left : left + TILE], pixels.permute(1, 2, 0).numpy())
    assert report.sheet == str(tmp_path / "out" / "sheet.png")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = main(["data", "doctor", *argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_command_reads_a_folder_without_a_base(
    ward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("graft.diffusion.base.load_base", None)
    sheet = tmp_path / "sheet.png"
    given = ("--set", "resolution=64", "--set", "buckets=true", "--trigger", "sks", "--out", str(sheet))
    code, document = run(capsys, str(ward), *given)
    assert code == 0 and document["pictures"] == 10 and sheet.is_file()
    levels = [finding["level"] for finding in document["findings"]]
    assert levels == sorted(levels, key=["error", "warning", "note"].index) and "error" in levels
    kinds = {finding["kind"]: finding["files"] for finding in document["findings"]}
    assert kinds["turned by EXIF"] == {"turned.jpg": "orientation 6"}
    assert main(["data", "doctor", str(ward)]) == 0
    assert "error: unreadable (2). Repair or remove them" in capsys.readouterr().out


def test_the_command_reads_a_job_with_its_base(
    folder: Path, ward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (ward / "fine-again.txt").write_text("a <cat>")
    (ward / "print.txt").write_text("one two three four five six seven eight <cat> nine ten")
    job = {
        "base": str(folder),
        "domain": "diffusion",
        "method": {"name": "textual_inversion", "token": "<cat>"},
        "data": {"path": "ward", "resolution": 64},
    }
    (tmp_path / "job.toml").write_text(write_toml(job))
    code, document = run(capsys, str(tmp_path / "job.toml"), "--set", "data.buckets=true")
    kinds = {finding["kind"]: finding["files"] for finding in document["findings"]}
    assert code == 0
    assert sorted(kinds["trigger missing"]) == ["fine.png", "panorama.png", "turned.jpg"]
    assert "print.jpg" in kinds["caption cut off"] and "fine-again.png" not in kinds["caption cut off"]
    assert kinds["caption cut off"]["print.jpg"].endswith("of 11 words are read")


@pytest.mark.parametrize("path", ["nowhere", "empty", "nowhere.toml"])
def test_a_bad_path_is_bad_input(tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    code, document = run(capsys, str(tmp_path / path))
    assert code == 2 and document["error"]["given"].endswith(path)
