"""Reads adapters of other libraries: which one wrote a file is told by its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graft.studio.adapter import Adapter
from graft.studio.errors import FormatError
from graft.studio.formats import (
    comfyui,
    control_model,
    custom_diffusion,
    diffusers,
    ip_adapter,
    kohya,
    kohya_flux,
    lokr,
    loralib,
    map_networks,
    peft,
    provenance,
    textual_inversion,
    torchtune,
)
from graft.studio.formats.files import PICKLES, read_tensors
from graft.studio.formats.peft_folder import CONFIG, FILE


def read(path: Path, head_dim: int | None = None) -> Adapter:
    """Reads a folder of peft, torchtune or diffusers (ControlNet and T2I-Adapter too), or a file of diffusers,
    IP-Adapter, kohya, LyCORIS, loralib, torchtune or Textual Inversion, with what its header says of where it comes
    from.

    Args:
        path: folder or file.
        head_dim: width of an attention head, for torchtune.

    Raises:
        FormatError: nothing of these, or a pickle, which is never opened.
    """
    if (path / FILE).is_file():
        return provenance.restored(peft.read(path), read_tensors(path / FILE)[1])
    file = _only(path) if path.is_dir() else path
    tensors, header = read_tensors(file)
    if torchtune.recognises(tensors):
        return provenance.restored(torchtune.read(file, head_dim), header)
    libraries = (
        ip_adapter,
        map_networks,
        control_model,
        lokr,
        comfyui,
        kohya_flux,
        kohya,
        loralib,
        custom_diffusion,
        textual_inversion,
    )
    library: Any = next((each for each in libraries if each.recognises(tensors)), diffusers)
    return provenance.restored(library.read(file), header)


def _only(folder: Path) -> Path:
    """The file in a folder: diffusers', or the only one with tensors."""
    for file in (custom_diffusion.FILE, diffusers.FILE, map_networks.FILE, textual_inversion.FILES["embedding"]):
        if (folder / file).is_file():
            return folder / file
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLES))
    found = [path for path in found if path.suffix == ".safetensors"] or found
    if len(found) != 1:
        held = ", ".join(path.name for path in found) or "none"
        remedy = f"give a file, or a folder with adapter.safetensors, {FILE} and {CONFIG}, or {diffusers.FILE}"
        reason = f"there is no adapter here, or not one alone (files with tensors: {held})"
        raise FormatError(str(folder), reason, remedy)
    return found[0]
