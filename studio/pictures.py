"""Reading picture files: the header first, then any mode as RGB, upright, with complaints in the user's words."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What reading a file that is no sound picture raises."""


def find_pictures(root: Path) -> list[Path]:
    """Returns the picture files below a folder by path; hidden ones (thumbnails, a Mac's shadow files) are none."""
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )


def checked_bytes(path: Path, max_megapixels: float, setting: str = "data.max_megapixels") -> bytes:
    """Returns a file's bytes, once its header says that it is a picture of a sane size; see `check_header`."""
    check_header(path, max_megapixels, setting)
    return path.read_bytes()


def check_header(path: Path, max_megapixels: float, setting: str = "data.max_megapixels") -> None:
    """Refuses a file whose header says that it is no picture, or none of a sane size. Nothing is decoded.

    Args:
        path: the file.
        max_megapixels: larger pictures are refused.
        setting: what the message calls that limit.

    Raises:
        ValueError: too many pixels, or too few.
        OSError: no picture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    if width * height > max_megapixels * 1e6:
        raise ValueError(f"{width:,} x {height:,} pixels, above {setting} = {max_megapixels:g}")
    if min(width, height) < 8:
        raise ValueError(f"{width} x {height} pixels are too few to learn from")


def open_picture(data: bytes, background: str = "white", near: int = 0) -> Image.Image:
    """Returns a picture as RGB: upright, transparent parts on the background, 16 bits brought down to 8.

    Args:
        data: the file's bytes.
        background: a colour name or #rrggbb.
        near: pixels; a JPEG is decoded at a reduced scale whose shorter side is no less than twice this. 0 decodes all.

    Raises:
        OSError: truncated or damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if near:
                width, height = opened.size
                reduce = 2 * near / min(width, height)
                opened.draft("RGB", (int(width * reduce), int(height * reduce)))  # JPEG only; never below that size
            return opaque(ImageOps.exif_transpose(opened), background)


def upright_size(source: bytes | Path) -> tuple[int, int]:
    """Returns width and height of a picture that is turned as its EXIF entry says; only its header is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(0x0112, 1) >= 5 else (width, height)


def alpha_of(data: bytes) -> Image.Image | None:
    """Returns how opaque each place of a picture is, upright, 8 bits; None if it has no transparency.

    Raises:
        OSError: truncated or damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if "A" not in opened.getbands() and "transparency" not in opened.info:
                return None
            return ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A")


def opaque(image: Image.Image, background: str = "white") -> Image.Image:
    """Returns RGB on the background, from any mode."""
    if image.mode.startswith("I"):  # 16 bits: PIL's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, background)
        image.alpha_composite(layer)
    return image.convert("RGB")


def complaint(error: Exception) -> str:
    """Returns PIL's complaint in the user's words."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture, whatever its name says"
    if isinstance(error, Image.DecompressionBombError):
        return f"far too many pixels ({error})"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, PermissionError):
        return "it may not be read"
    return str(error)
