"""LoRA of a transformer in ComfyUI's layout, as ai-toolkit and others write it:
``diffusion_model.<module>.lora_A.weight`` and ``.lora_B.weight``, or ``.lora_down.weight``, ``.lora_up.weight`` and
``.alpha``.

Modules are those of the model's own code. For Qwen-Image and Z-Image they have the same paths in diffusers, for FLUX
they are taken apart as in `graft.studio.formats.kohya_flux`. It is read and not written: ComfyUI reads diffusers' file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from graft.studio.adapter import Adapter
from graft.studio.formats import kohya, kohya_flux
from graft.studio.formats.files import read_tensors
from graft.studio.formats.low_rank import to_adapter

_PREFIX = "diffusion_model."
_ENDS = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}


def recognises(keys: Iterable[str]) -> bool:
    """Whether these are the keys of such a file."""
    return all(key.startswith(_PREFIX) for key in keys)


def read(path: Path) -> Adapter:
    """Reads a file of Qwen-Image, Z-Image or FLUX.

    Raises:
        FormatError: keys beside factors and alphas, or in FLUX a module that diffusers does not have.
    """
    tensors = {}
    for key, tensor in read_tensors(path)[0].items():
        name = key.removeprefix(_PREFIX)
        for end, kohyas in _ENDS.items():
            name = name.removesuffix(end) + kohyas if name.endswith(end) else name
        tensors[name] = tensor
    modules = kohya.factors_of(tensors, str(path))
    if any(re.match(r"(double|single)_blocks\.", name) for name in modules):
        fused = {f"lora_unet_{name.replace('.', '_')}": module for name, module in modules.items()}
        return to_adapter(kohya_flux.apart(fused, str(path)), "diffusion", str(path))
    return to_adapter({f"transformer.{name}": module for name, module in modules.items()}, "diffusion", str(path))
