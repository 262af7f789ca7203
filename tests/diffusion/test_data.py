import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graft.diffusion.data import DataConfig, load_dataset, load_pixels
from graft.studio.caches import Cache
from graft.studio.errors import DataError, InputError


def load(path: Path, **settings):
    return load_dataset(DataConfig(path=str(path), **settings), 16, Cache())


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    wave = 127 + 60 * np.sin(x / width * 9) + 60 * np.sin(y / height * 7)
    return Image.fromarray(np.stack([wave, wave[::-1], wave[:, ::-1]], -1).astype(np.uint8))


def test_pixels_are_the_centre_square_resized(photos: Path):
    dataset = load(photos)
    assert dataset.pixels.shape == (5, 1, 3, 16, 16) and dataset.pixels.dtype == torch.uint8
    centre = np.asarray(Image.open(photos / "0.png"))[:, 4:20]
    assert np.array_equal(dataset.pixels[0, 0].permute(1, 2, 0).numpy(), centre)


def test_own_captions_come_before_the_configured_one(photos: Path):
    (photos / "0.txt").write_text("a red cat\n", "utf-8")
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "ein Bär"}) + "\n", "utf-8")
    captions = [p.caption for p in load(photos, caption="{token} in {folder}").pictures]
    assert captions == ["a red cat", "ein Bär", *["{token} in photos"] * 3]
    assert load(photos).pictures[2].caption is None


def test_captions_from_folder_name_and_template(photos: Path):
    (photos / "10_sks dog").mkdir()
    (photos / "0.png").rename(photos / "10_sks dog" / "on_the_beach.png")
    (photos / "1.caption").write_text("a red cat")
    (photos / "2.txt").write_text("\ufeffa blue cat", "utf-8")

    def captions(template: str | None) -> list[str | None]:
        pictures = load(photos, caption=template).pictures
        return [picture.caption for picture in sorted(pictures, key=lambda picture: picture.path.name)]

    assert captions(None) == ["a red cat", "a blue cat", None, None, None]
    assert captions("{folder}") == ["a red cat", "a blue cat", "photos", "photos", "sks dog"]
    assert captions("{folder}, {name}")[-1] == "sks dog, on the beach"
    own = ["{token}, a red cat", "{token}, a blue cat", "{token}", "{token}", "{token}"]
    assert captions("{token}, {caption}") == own


def test_exif_orientation_is_applied(tmp_path: Path):
    picture = gradient(32, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    picture.save(tmp_path / "turned.png", exif=exif)
    dataset = load(tmp_path)
    upright = np.rot90(np.asarray(picture), -1)[8:24]
    assert np.array_equal(dataset.pixels[0, 0].permute(1, 2, 0).numpy(), upright)


def test_transparency_is_laid_on_the_background(tmp_path: Path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load(tmp_path, background="#102030").pixels[0, 0, :, 0, 0].tolist() == [16, 32, 48]


def test_sixteen_bit_pictures_keep_their_range(tmp_path: Path):
    Image.fromarray(np.full((16, 16), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert load(tmp_path).pixels.unique().tolist() == [0x80]


def test_phone_pictures_decode_reduced_without_visible_difference(tmp_path: Path):
    picture = gradient(2000, 1500)
    picture.save(tmp_path / "phone.jpg", quality=92)
    fast = load_pixels((tmp_path / "phone.jpg").read_bytes(), 64, DataConfig(path="")).permute(1, 2, 0).numpy()
    slow = Image.open(tmp_path / "phone.jpg").crop((250, 0, 1750, 1500)).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(fast.astype(int) - np.asarray(slow).astype(int)).mean() < 1.0


def test_a_cached_picture_is_not_decoded_again(photos: Path, monkeypatch: pytest.MonkeyPatch):
    first = load(photos)
    cache = Cache()
    monkeypatch.setattr("graft.diffusion.data.load_pixels", None)
    again = load_dataset(DataConfig(path=str(photos)), 16, cache)
    assert torch.equal(first.pixels, again.pixels) and first.digest == again.digest
    assert str(cache) == "pixels 5 hits, 0 misses"


def test_digest_follows_bytes_captions_and_transform(photos: Path):
    before = load(photos).digest
    (photos / "3.txt").write_text("a cat")
    captioned = load(photos).digest
    gradient(24, 16).save(photos / "3.png")
    digests = {before, captioned, load(photos).digest, load(photos, resolution=32).digest}
    assert len(digests) == 4


def test_variants_crop_and_flip(tmp_path: Path):
    gradient(64, 16).save(tmp_path / "wide.png")
    pixels = load(tmp_path, crop="random", flip=True, variants=4).pixels[0]
    assert len({p.numpy().tobytes() for p in pixels}) == 4
    still = load(tmp_path, flip=True, variants=2).pixels[0]
    assert torch.equal(still[1], still[0].flip(-1))


def header(width: int, height: int) -> bytes:
    """A PNG that claims any size and holds nothing."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [ihdr, b"IDAT" + zlib.compress(b""), b"IEND"]
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_every_problem_of_a_folder_is_listed(photos: Path):
    (photos / "bomb.png").write_bytes(header(60_000, 60_000))
    (photos / "large.png").write_bytes(header(12_000, 11_000))
    (photos / "letter.png").write_text("dear reader")
    gradient(64, 64).save(photos / "whole.jpg")
    whole = (photos / "whole.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) * 4 // 5])
    (photos / "metadata.jsonl").write_text('{"file_name": "../../secret.png", "text": "x"}\n{"file": 1}\n')
    with pytest.raises(DataError) as error:
        load(photos)
    assert error.value.exit_code == 2
    message = str(error.value)
    assert "6 problems" in message
    assert "bomb.png: far too many pixels" in message
    assert "large.png: 12,000 x 11,000 pixels, above data.max_megapixels = 120" in message
    assert "letter.png: not a picture" in message
    assert "cut.jpg: image file is truncated" in message
    assert "../../secret.png lies outside the folder" in message
    assert "metadata.jsonl:2: expected" in message


def test_a_folder_must_exist_and_hold_pictures(tmp_path: Path):
    with pytest.raises(DataError, match="there is no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no pictures"):
        load(tmp_path)


@pytest.mark.parametrize("wrong", [{"resolution": 7}, {"variants": 0}, {"max_megapixels": 0}, {"crop": "left"}])
def test_settings_out_of_range_are_refused(wrong: dict):
    with pytest.raises(InputError, match=f"data.{next(iter(wrong))} = "):
        DataConfig(path="x", **wrong)


def test_hidden_files_are_no_pictures(photos: Path, tmp_path: Path):
    (photos / "more").mkdir()
    for name in ("._0.png", "more/._0.png"):
        (photos / name).write_bytes(b"a Mac's shadow file")
    assert len(load_dataset(DataConfig(path=str(photos)), 8, Cache(tmp_path / "c")).pictures) == 5
