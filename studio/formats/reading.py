"""Reads adapters of other libraries: which one wrote a file is told by its keys."""

from __future__ import annotations

from pathlib import Path

from graft.studio.adapter import Adapter
from graft.studio.errors import FormatError
from graft.studio.formats import custom_diffusion, diffusers, ip_adapter, kohya, loralib, peft, torchtune
from graft.studio.formats.files import PICKLES, read_tensors
from graft.studio.formats.peft_folder import CONFIG, FILE


def read(path: Path, head_dim: int | None = None) -> Adapter:
    """Reads a folder of peft, torchtune or diffusers, or a file of diffusers, IP-Adapter, kohya, loralib or torchtune.

    Args:
        path: folder or file.
        head_dim: width of an attention head, for torchtune.

    Raises:
        FormatError: nothing of these, or a pickle, which is never opened.
    """
    if (path / FILE).is_file():
        return peft.read(path)
    if (path / custom_diffusion.FILE).is_file():
        return custom_diffusion.read(path)
    file = _only(path) if path.is_dir() else path
    keys = read_tensors(file)[0]
    if torchtune.recognises(keys):
        return torchtune.read(file, head_dim)
    library = next(
        (each for each in (ip_adapter, kohya, loralib, custom_diffusion) if each.recognises(keys)), diffusers
    )
    return library.read(file)


def _only(folder: Path) -> Path:
    """The file in a folder: diffusers', or the only one with tensors."""
    if (folder / diffusers.FILE).is_file():
        return folder / diffusers.FILE
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLES))
    found = [path for path in found if path.suffix == ".safetensors"] or found
    if len(found) != 1:
        held = ", ".join(path.name for path in found) or "none"
        remedy = f"give a file, or a folder with adapter.safetensors, {FILE} and {CONFIG}, or {diffusers.FILE}"
        reason = f"there is no adapter here, or not one alone (files with tensors: {held})"
        raise FormatError(str(folder), reason, remedy)
    return found[0]
