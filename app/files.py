"""What the pages show from disk: samples of runs, uploaded pictures as training sees them, previews, exports.

Every address is looked up among the things that are there. Pictures are written anew as PNG or sent as a run wrote
them; everything else is sent as a file to keep, never shown.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, Response
from PIL import Image

from graft.app.place import Place
from graft.app.uploads import MAX_MEGAPIXELS, mask_file
from graft.studio.errors import InputError
from graft.studio.pictures import BROKEN, checked_bytes, find_pictures, open_picture
from graft.studio.runs import Run

KINDS = {".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg"}
THUMB = 192
"""Pixels of the square that shows an uploaded picture."""


def sample_url(run: Run, path: Path) -> str:
    """Address of a picture of a run."""
    return quote(f"/files/runs/{run.id}/{path.relative_to(run.folder).as_posix()}") + f"?{path.stat().st_mtime_ns}"


def thumb_url(name: str, picture: str, path: Path) -> str:
    """Address of an uploaded picture's square; another one when the picture, or its mask, is another."""
    stamps = [file.stat().st_mtime_ns for file in (path, mask_file(path)) if file.is_file()]
    return quote(f"/files/data/{name}/{picture}") + f"?{'-'.join(map(str, stamps))}"


def shown_url(work: Path, path: Path) -> str:
    """Address of a picture of a preview."""
    return quote(f"/files/shown/{path.relative_to(work / 'shown').as_posix()}")


def export_url(work: Path, path: Path) -> str:
    """Address of an exported file."""
    return quote(f"/files/exports/{path.relative_to(work / 'exports').as_posix()}")


def routes(place: Place) -> APIRouter:
    """The addresses below /files."""
    router = APIRouter(prefix="/files")

    @router.get("/runs/{run}/{path:path}")
    def sample(run: str, path: str) -> Response:
        folder = _found(place, run).folder
        pictures = [*_found(place, run).samples(), *(folder / "result").glob("preview.*")]
        return _picture({file.relative_to(folder).as_posix(): file for file in pictures}, path)

    @router.get("/data/{name}/{path:path}")
    def thumb(name: str, path: str) -> Response:
        try:
            folder = place.data_set(name)
        except InputError:
            raise HTTPException(404) from None
        found = {file.relative_to(folder).as_posix(): file for file in find_pictures(folder)}
        if path not in found:
            raise HTTPException(404)
        return Response(square(found[path]), media_type="image/png", headers={"cache-control": "private, max-age=600"})

    @router.get("/shown/{path:path}")
    def shown(path: str) -> Response:
        root = place.work / "shown"
        return _picture({file.relative_to(root).as_posix(): file for file in root.rglob("*.png")}, path)

    @router.get("/exports/{path:path}")
    def export(path: str) -> Response:
        root = place.work / "exports"
        found = {file.relative_to(root).as_posix(): file for file in root.rglob("*") if _plain(file, root)}
        if path not in found:
            raise HTTPException(404)
        file = found[path]
        return FileResponse(file, media_type="application/octet-stream", filename=file.name)

    return router


def square(path: Path) -> bytes:
    """The centre of a picture, as training crops it, as PNG; what its mask leaves out is dark.

    Raises:
        HTTPException: it can no longer be read.
    """
    mask = mask_file(path)
    try:
        picture = open_picture(checked_bytes(path, MAX_MEGAPIXELS), near=THUMB)
        if mask.is_file():
            marked = open_picture(checked_bytes(mask, MAX_MEGAPIXELS), "black").convert("L").resize(picture.size)
            picture = Image.composite(picture, picture.point(lambda value: value // 4), marked)
    except BROKEN:
        raise HTTPException(404) from None
    edge = min(picture.size)
    left, top = ((length - edge) // 2 for length in picture.size)
    data = BytesIO()
    picture.resize((THUMB, THUMB), box=(left, top, left + edge, top + edge)).save(data, "PNG")
    return data.getvalue()


def _found(place: Place, run: str) -> Run:
    try:
        return place.run(run)
    except InputError:
        raise HTTPException(404) from None


def _picture(found: dict[str, Path], path: str) -> Response:
    if path not in found or found[path].suffix not in KINDS or found[path].is_symlink():
        raise HTTPException(404)
    headers: dict[str, Any] = {"cache-control": "private, max-age=600"}
    return FileResponse(found[path], media_type=KINDS[found[path].suffix], headers=headers)


def _plain(file: Path, root: Path) -> bool:
    """Tell whether a file may be handed out: no link, nothing hidden."""
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not file.is_symlink() and not hidden
