"""What a browser may send as pictures."""

import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from graft.app import uploads
from graft.app.place import Place
from graft.studio.errors import InputError
from graft.studio.pictures import find_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def archive(path: Path, entries: dict[str, bytes], link: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in entries.items():
            opened.writestr(name, data)
        if link:
            entry = zipfile.ZipInfo(link)
            entry.external_attr = 0o120777 << 16
            opened.writestr(entry, "/etc/passwd")
    return path


def png(size: tuple[int, int] = (32, 32)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, "teal").save(data, "PNG")
    return data.getvalue()


def test_pictures_are_written_anew(folder: Path, tmp_path: Path) -> None:
    photo = tmp_path / "IMG; $(rm) ..\u202e.JPG"
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "<script>where I live"
    Image.new("RGB", (40, 20), "red").save(photo, "JPEG", exif=exif)
    assert uploads.add_files(folder, [photo]) == []
    (path,) = find_pictures(folder)
    assert path.name == "0001.png"
    with Image.open(path) as written:
        assert (written.size, dict(written.getexif()), written.info) == ((20, 40), {}, {})  # upright
    assert b"script" not in path.read_bytes()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"),
        ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("a.png", b"<html><script>alert(1)</script>"),
        ("a.png", png()[:-40]),
        ("a.png", b""),
        ("a.zip", b"PK\x03\x04 no archive"),
    ],
)
def test_what_is_no_picture_is_refused(folder: Path, tmp_path: Path, name: str, data: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    (told,) = uploads.add_files(folder, [file])
    assert told.startswith(name)
    assert list(folder.iterdir()) == []


def test_bombs_are_refused_from_their_headers(folder: Path, tmp_path: Path) -> None:
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    (told,) = uploads.add_files(folder, [tmp_path / "bomb.png"])
    assert "pixels" in told
    bomb = archive(tmp_path / "bomb.zip", {"a.png": b"\0" * (8 << 20)})
    (told,) = uploads.add_files(folder, [bomb])
    assert "unpack" in told
    many = archive(tmp_path / "many.zip", {f"{k}.txt": b"x" for k in range(4 * uploads.MAX_FILES + 1)})
    (told,) = uploads.add_files(folder, [many])
    assert "entries" in told
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["../a.png", "/tmp/a.png", "x/../../a.png", "..\\a.png", "C:\\a.png"])
def test_archives_stay_inside(folder: Path, tmp_path: Path, name: str) -> None:
    (told,) = uploads.add_files(folder, [archive(tmp_path / "a.zip", {name: png()})])
    assert "leads out" in told
    assert list(folder.iterdir()) == []


def test_links_in_archives_are_refused(folder: Path, tmp_path: Path) -> None:
    (told,) = uploads.add_files(folder, [archive(tmp_path / "a.zip", {"a.png": png()}, link="b.png")])
    assert "leads out" in told


def test_classes_come_from_an_archive_or_a_label(folder: Path, tmp_path: Path) -> None:
    entries = {"set/red apple/1.png": png(), "set/pear/1.png": png(), "set/.hidden/1.png": png(), "set/x.exe": b"MZ"}
    assert uploads.add_files(folder, [archive(tmp_path / "a.zip", entries)]) == []
    file = tmp_path / "b.png"
    file.write_bytes(png())
    assert uploads.add_files(folder, [file], "../../fig/<b>") == []
    assert sorted(path.relative_to(folder).as_posix() for path in find_pictures(folder)) == [
        "fig b/0003.png", "pear/0002.png", "red apple/0001.png",
    ]  # fmt: skip
    (told,) = uploads.add_files(folder, [file], "../..")
    assert "no letter" in told


def test_count_is_limited(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_FILES", 2)
    file = tmp_path / "b.png"
    file.write_bytes(png())
    assert len(uploads.add_files(folder, [file] * 3)) == 1


@pytest.mark.parametrize(
    "name",
    ["..", "../x", "/etc", "a\0b", "20260101-0123456789ab/..", "", "20260101-0123456789AB", "~", "C:\\x", "．．/x"],
)
def test_ids_never_become_paths(tmp_path: Path, name: str) -> None:
    place = Place(tmp_path / "runs", tmp_path / "data", None)  # type: ignore[arg-type]
    for look in (place.data_set, place.run):
        with pytest.raises(InputError, match="there is no such"):
            look(name)
