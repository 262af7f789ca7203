"""What is wrong, or only worth knowing, in a folder of training pictures, before anything is trained.

Every picture is read and cut as the training would do it; a base is needed only for how much text it reads. Near
duplicates are found by the signs of the differences between neighbouring places of the picture, brought down to 17 x 16
grey values (a "difference hash" of 256 bits): pictures that differ in few of them look alike.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from graft.diffusion.buckets import Shape, nearest
from graft.diffusion.data import DataConfig, mask_fault, mask_of, shapes_of, variants
from graft.diffusion.folder import Found, caption_file, find
from graft.studio.disk import write_atomic
from graft.studio.pictures import (
    BROKEN,
    FORMATS,
    alpha_of,
    checked_bytes,
    complaint,
    find_pictures,
    open_picture,
    upright_size,
)

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase

ALIKE = 16
"""Bits of 256 in which near duplicates may differ; unrelated pictures differ in about 128."""
CLIP_TOKENS = 75
"""What CLIP's text encoder reads of a prompt; every word and every sign is one token or more."""
SHEET = 400
"""Crops on the contact sheet at most: those of the first pictures."""
TILE = 160
"""Pixels of a crop's longer side on the contact sheet."""
KINDS = {
    "unreadable": ("error", "Repair or remove them: a training refuses the folder"),
    "bad caption file": ("error", "Save it as UTF-8, or correct the line: a training refuses the folder"),
    "bad mask": ("error", "Correct or remove it: a training refuses the folder"),
    "duplicate": ("warning", "Remove all but one: it counts several times"),
    "near duplicate": ("warning", "Keep the best of them, unless each shows something of its own"),
    "small": ("warning", "They are enlarged and look soft: find larger ones, or lower data.resolution"),
    "much is cut off": ("warning", "Look at the contact sheet; set data.buckets = true, or crop them yourself"),
    "empty caption": ("warning", "Write one, or delete the file: the method's templates are used"),
    "caption cut off": ("warning", "Shorten it: the text encoder does not read the rest"),
    "trigger missing": ("warning", "Write the word into the caption, or the word is not learnt from it"),
    "no caption": ("note", "The method's templates are used; `graft data caption` writes captions"),
    "caption without picture": ("note", "Nothing reads it"),
    "turned by EXIF": ("note", "They are shown upright"),
    "transparent": ("note", "They are laid on data.background; with data.mask = 'alpha' only what is opaque is learnt"),
    "grey": ("note", "The base may come to draw without colours"),
    "CMYK": ("note", "Colours are converted without a profile: look at the contact sheet"),
    "animated": ("note", "Only the first frame is used"),
}
"""Kind of finding -> how bad it is, and what to do."""


@dataclass
class Report:
    """What was found."""

    path: str
    """The folder."""
    pictures: int = 0
    """How many can be used."""
    captions: int = 0
    """How many of these have a caption."""
    masks: int = 0
    """How many have a mask."""
    shapes: list[dict[str, Any]] = field(default_factory=list)
    """Per shape: `width`, `height`, `pictures`, and `cut`, the share of their area that is cut off."""
    found: dict[str, dict[str, str]] = field(default_factory=dict)
    """Per kind of finding: file -> what about it."""
    sheet: str | None = None
    """File of the contact sheet."""

    def add(self, kind: str, file: str, detail: str = "") -> None:
        """Notes a finding."""
        self.found.setdefault(kind, {})[file] = detail

    def document(self) -> dict[str, Any]:
        """As JSON holds it; the worst findings first."""
        findings = [
            {"kind": kind, "level": level, "remedy": remedy, "files": self.found[kind]}
            for kind, (level, remedy) in KINDS.items()
            if kind in self.found
        ]
        facts = {name: getattr(self, name) for name in ("path", "pictures", "captions", "masks", "shapes", "sheet")}
        return {**facts, "findings": findings}

    def text(self) -> str:
        """For people: findings with their first files."""
        lines = [f"{self.path}: {self.pictures} pictures, {self.captions} with captions, {self.masks} with masks"]
        for row in self.shapes:
            count = f"{row['pictures']} picture{'s' * (row['pictures'] != 1)}"
            lines.append(f"  {row['width']} x {row['height']}: {count}, {row['cut']:.0%} cut off")
        for finding in self.document()["findings"]:
            files = finding["files"]
            lines.append(f"{finding['level']}: {finding['kind']} ({len(files)}). {finding['remedy']}.")
            lines += [f"    {name}" + (f": {told}" if told else "") for name, told in list(files.items())[:5]]
            lines += [f"    and {len(files) - 5} more"] * (len(files) > 5)
        if not self.found:
            lines.append("Nothing is wrong.")
        return "\n".join([*lines, *([f"Contact sheet: {self.sheet}"] if self.sheet else [])])


def examine(
    config: DataConfig,
    base: DiffusionBase | None = None,
    triggers: Sequence[str] = (),
    out: Path | None = None,
    rescale: bool = False,
) -> Report:
    """Looks at every picture and caption of a folder.

    Args:
        config: how the training would read it. Without a base, a resolution of 0 is 512.
        base: tells its own resolution, and how much of a caption it reads; None takes Stable Diffusion's.
        triggers: words of which each caption must hold one; none: nothing is asked for.
        out: file of a contact sheet, PNG: pictures as they will be trained on, some hundreds at most.
        rescale: show them on it smaller and larger, as Custom Diffusion's augmentation does.

    Raises:
        DataError: no folder, or no pictures in it.
    """
    report, problems = Report(config.path), list[str]()
    found = find(config, problems)
    for problem in problems:
        report.add("bad mask" if "no picture of this name" in problem else "bad caption file", *_split(problem))
    side = base.side(config.resolution) if base else config.resolution or 512
    among = shapes_of(config, side, base.multiple if base else min(64, max(8, side // 8)))
    looks, cuts = list[_Look](), dict[Shape, list[float]]()
    for each in found:
        look = _look(each, config, among, report)
        if look is not None:
            if out is not None and sum(len(other.crops) for other in looks) < SHEET:
                look.crops.extend(_crops(each, look, config, rescale))
            looks.append(look)
            cuts.setdefault(look.shape, []).append(look.cut)
            _check_caption(each, look.name, base, triggers, report)
    report.pictures, report.captions = len(looks), sum(look.captioned for look in looks)
    report.masks = sum(look.masked for look in looks)
    report.shapes = [
        {"width": w, "height": h, "pictures": len(cut), "cut": round(float(np.mean(cut)), 4)}
        for (h, w), cut in sorted(cuts.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    _duplicates(looks, report)
    _stray_captions(Path(config.path), report)
    if out is not None:
        report.sheet = str(_write_sheet(looks, out))
    return report


@dataclass(frozen=True)
class _Look:
    """What one look at a picture tells."""

    name: str
    digest: str
    bits: np.ndarray | None
    """(256,) bool, its difference hash; None of a picture without any detail."""
    shape: Shape
    cut: float
    captioned: bool
    masked: bool
    crops: list[Image.Image]


def _split(problem: str) -> tuple[str, str]:
    file, _, detail = problem.partition(": ")
    return file, detail


def _look(found: Found, config: DataConfig, among: tuple[Shape, ...], report: Report) -> _Look | None:
    """Reads a picture, and notes what is to be said of the file; None if it cannot be used."""
    name = str(found.path.relative_to(config.path))
    try:
        data = checked_bytes(found.path, config.max_megapixels)
        size = upright_size(data)
        shape = nearest(size, among)
        image = open_picture(data, config.background, near=max(shape))
    except BROKEN as error:
        report.add("unreadable", name, complaint(error))
        return None
    _check_mode(data, name, report)
    (h, w), (width, height) = shape, size
    share = (min(width, height * w / h) * min(height, width * h / w)) / (width * height)
    if share < 0.7:
        report.add("much is cut off", name, f"{width} x {height} pixels, {1 - share:.0%} of them")
    if (factor := max(w / width, h / height)) > 1:
        report.add("small", name, f"{width} x {height} pixels, enlarged {factor:.2g} times")
    digest, mask = hashlib.sha256(data).hexdigest(), mask_of(found, config)
    marked = alpha_of(data) if config.mask == "alpha" else None
    if mask is not None:
        marked = _mask(mask, size, config, report)
    return _Look(name, digest, _bits(image), shape, 1 - share, bool(found.caption), marked is not None, [])


def _crops(found: Found, look: _Look, config: DataConfig, rescale: bool) -> list[Image.Image]:
    """The first variants of a picture; what its mask does not mark is darker."""
    data, mask, crops = found.path.read_bytes(), None, []
    if look.masked:
        file = mask_of(found, config)
        mask = open_picture(file.read_bytes(), "black").convert("L") if file else alpha_of(data)
    image = open_picture(data, config.background, near=max(look.shape))
    for way in variants(look.digest, look.shape, config, rescale)[:4]:
        crop = way.cut(image)
        dark = crop.point(lambda value: value // 4)
        crops.append(crop if mask is None else Image.composite(crop, dark, way.cut(mask)))
    return crops


def _mask(file: Path, size: tuple[int, int], config: DataConfig, report: Report) -> Image.Image | None:
    name = str(file.relative_to(config.path))
    try:
        data = checked_bytes(file, config.max_megapixels)
        if (fault := mask_fault(data, size)) is None:
            return open_picture(data, "black").convert("L")
    except BROKEN as error:
        fault = complaint(error)
    report.add("bad mask", name, fault)
    return None


def _check_mode(data: bytes, name: str, report: Report) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.getexif().get(0x0112, 1) not in (0, 1):
                report.add("turned by EXIF", name, f"orientation {image.getexif()[0x0112]}")
            if "A" in image.getbands() or "transparency" in image.info:
                report.add("transparent", name, f"mode {image.mode}")
            if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
                report.add("grey", name, f"mode {image.mode}")
            if image.mode == "CMYK":
                report.add("CMYK", name)
            if getattr(image, "n_frames", 1) > 1:
                report.add("animated", name, f"{getattr(image, 'n_frames', 1)} frames")


def _check_caption(
    found: Found, name: str, base: DiffusionBase | None, triggers: Sequence[str], report: Report
) -> None:
    caption, file = found.caption, caption_file(found.path)
    if file is not None and not file.read_bytes().strip():
        report.add("empty caption", name, file.name)
    elif not caption:
        report.add("no caption", name)
    if not caption:
        return
    read = _words_read(caption.replace("{token}", triggers[0] if triggers else "{token}"), base)
    if read is not None:
        report.add("caption cut off", name, read)
    if triggers and not any(word in caption for word in ("{token}", *triggers)):
        report.add("trigger missing", name, f"{caption[:60]!r} has no {' or '.join(triggers)}")


def _words_read(caption: str, base: DiffusionBase | None) -> str | None:
    """How much of a caption the text encoder reads, or None for all of it."""
    words = caption.split()
    if base is None:
        count = len(re.findall(r"\w+|[^\w\s]", caption))
        return f"{count} words and signs or more, {CLIP_TOKENS} tokens are read" if count > CLIP_TOKENS else None
    # Any tokenizer of any family: where the last words change no id, they are not read.
    whole = base.tokenize([caption])
    few, many = 0, len(words)
    while few < many:
        middle = (few + many) // 2
        few, many = (few, middle) if base.tokenize([" ".join(words[:middle])]).equal(whole) else (middle + 1, many)
    return f"{many} of {len(words)} words are read" if many < len(words) else None


def _bits(image: Image.Image) -> np.ndarray | None:
    grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    if grey.max() - grey.min() < 8:
        return None
    return (grey[:, 1:] > grey[:, :-1]).ravel()


def _duplicates(looks: Sequence[_Look], report: Report) -> None:
    first: dict[str, str] = {}
    for look in looks:
        if first.setdefault(look.digest, look.name) != look.name:
            report.add("duplicate", look.name, f"the same file as {first[look.digest]}")
    rest = [look for look in looks if look.bits is not None and first[look.digest] == look.name]
    if not rest:
        return
    bits = np.stack([look.bits for look in rest if look.bits is not None])
    for i in range(1, len(rest)):
        differing = (bits[:i] != bits[i]).sum(1)
        if differing.min() <= ALIKE:
            report.add("near duplicate", rest[i].name, f"looks like {rest[int(differing.argmin())].name}")


def _stray_captions(root: Path, report: Report) -> None:
    pictures = {path.with_suffix("") for path in find_pictures(root)}
    for suffix in ("*.txt", "*.caption"):
        for path in sorted(root.rglob(suffix)):
            if path.with_suffix("") not in pictures and not path.name.startswith("."):
                report.add("caption without picture", str(path.relative_to(root)))


def _write_sheet(looks: Sequence[_Look], out: Path) -> Path:
    """All crops with their names; beside each other the first variants of a picture."""
    crops = [(look, crop) for look in looks for crop in look.crops]
    columns = max(1, min(8, len(crops)))
    label, gap, font = 16, 6, ImageFont.load_default(11)
    rows = max(1, -(-len(crops) // columns))
    sheet = Image.new("RGB", (columns * (TILE + gap) + gap, rows * (TILE + label + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (look, crop) in enumerate(crops):
        left, top = gap + place % columns * (TILE + gap), gap + place // columns * (TILE + label + gap)
        scale = TILE / max(crop.size)
        filter = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
        shown = crop.resize((max(1, round(crop.width * scale)), max(1, round(crop.height * scale))), filter)
        sheet.paste(shown, (left + (TILE - shown.width) // 2, top))
        name = look.name if len(look.name) <= 24 else "…" + look.name[-23:]
        pen.text((left, top + TILE + 2), f"{name} {crop.width}x{crop.height}", "black", font)
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return write_atomic(out, data.getvalue())


def examine_job(job: Any, trigger: str | None = None, out: Path | None = None) -> Report:
    """Looks at a job's data as its training would, which loads the job's base.

    Args:
        job: of this domain.
        trigger: what captions must contain; None takes the method's words.
        out: as `examine` takes it.

    Raises:
        InputError: anything wrong with the job's base.
        DataError: no folder, or no pictures in it.
    """
    from graft.diffusion.base import load_base
    from graft.studio.config import from_dict
    from graft.studio.registry import method_class

    section = {key: value for key, value in job.method.items() if key != "name"}
    method: Any = from_dict(method_class("diffusion", str(job.method["name"])), section, "method")
    base = load_base(job.base, "cpu")
    config = from_dict(DataConfig, dict(job.data), "data")
    words = getattr(method, "tokens", None) or ((method.trigger,) if method.trigger else ())
    return examine(config, base, (trigger,) if trigger else words, out, method.rescales)
