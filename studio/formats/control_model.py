"""ControlNet in its authors' layout, one file with ``control_model.input_blocks.1.0.in_layers.0.weight``, as sd-scripts
writes it and AUTOMATIC1111 and ComfyUI read it.

Blocks are numbered through, downsamplers among them; inside they are those of diffusers but for the names of a
ResNet's layers. A file does not tell its config: which of Stable Diffusion 1, 2 and XL it is for, the width of the
text tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from graft.studio.adapter import Adapter, Card
from graft.studio.errors import FormatError, InputError
from graft.studio.formats.files import read_tensors, write_tensors
from graft.studio.formats.map_networks import condition_of

FILE = "control_model.safetensors"
_PREFIX = "control_model."
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_V1 = {"_class_name": "ControlNetModel", "down_block_types": [*[_CROSS] * 3, _PLAIN], "cross_attention_dim": 768}
CONFIGS: dict[int, dict[str, Any]] = {
    768: _V1,
    1024: _V1 | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    2048: _V1
    | {
        "cross_attention_dim": 2048,
        "down_block_types": [_PLAIN, _CROSS, _CROSS],
        "block_out_channels": [320, 640, 1280],
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Width of the text -> config of diffusers' class, where it is not the class's default."""


def recognises(keys: Iterable[str]) -> bool:
    """Whether these are the keys of such a file."""
    return any(key.startswith(_PREFIX) for key in keys)


def export(adapter: Adapter, tensors: Mapping[str, Tensor], folder: Path, header: Mapping[str, str]) -> list[Path]:
    """Writes a file.

    Args:
        adapter: whose card holds the network's config.
        tensors: the network's, by diffusers' names.
        folder: to write.
        header: to write into the file.

    Raises:
        InputError: a tensor that the layout has no name for.
    """
    back = {theirs: own for own, theirs in _stems(adapter.card.details["controlnet"]).items()}
    inner = {name: own for own, name in _RESNET.items()}
    named = {}
    for name, tensor in tensors.items():
        found = _renamed(name, back, inner)
        if found is None:
            raise InputError(name, "the layout has no name for it", "use native or diffusers")
        named[_PREFIX + found] = tensor
    return [write_tensors(folder / FILE, named, {"format": "pt", **header})]


def read(path: Path) -> Adapter:
    """Reads a ControlNet of Stable Diffusion 1, 2 or XL.

    Raises:
        FormatError: of another base, or a key that is no part of it.
    """
    tensors, header = read_tensors(path)
    width = next((x.shape[1] for key, x in tensors.items() if key.endswith(".attn2.to_k.weight")), 0)
    if width not in CONFIGS:
        reason = f"its text is {width} wide, that of Stable Diffusion 1, 2 and XL {', '.join(map(str, CONFIGS))}"
        raise FormatError(str(path), reason, "give the folder that diffusers saved")
    stems, named = _stems(CONFIGS[width]), {}
    for key, tensor in tensors.items():
        name = _renamed(key.removeprefix(_PREFIX), stems, _RESNET)
        if name is None or not key.startswith(_PREFIX):
            raise FormatError(f"{path}: {key}", "no part of a ControlNet", "give a file of a ControlNet alone")
        named[name] = tensor
    config = json.loads(json.dumps(CONFIGS[width]))
    return Adapter(named, Card("controlnet", condition_of(header), "diffusion", details={"controlnet": config}))


def _stems(config: Mapping[str, Any]) -> dict[str, str]:
    """The layout's modules to diffusers'."""
    blocks, layers = len(config["down_block_types"]), int(config.get("layers_per_block", 2))
    hints = 2 * (len(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256))) - 1)
    embedding = "controlnet_cond_embedding"
    stems = {
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "middle_block_out.0": "controlnet_mid_block",
        "input_hint_block.0": f"{embedding}.conv_in",
        f"input_hint_block.{2 * hints + 2}": f"{embedding}.conv_out",
    }
    for place in (0, 2):
        stems[f"time_embed.{place}"] = f"time_embedding.linear_{place // 2 + 1}"
        stems[f"label_emb.0.{place}"] = f"add_embedding.linear_{place // 2 + 1}"
    stems |= {f"input_hint_block.{2 * i + 2}": f"{embedding}.blocks.{i}" for i in range(hints)}
    stems |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(blocks * (layers + 1))}
    for block in range(blocks):
        first = block * (layers + 1) + 1
        for place, part in enumerate(("resnets", "attentions")):
            stems |= {f"input_blocks.{first + i}.{place}": f"down_blocks.{block}.{part}.{i}" for i in range(layers)}
        stems[f"input_blocks.{first + layers}.0.op"] = f"down_blocks.{block}.downsamplers.0.conv"
    return stems


def _renamed(name: str, stems: Mapping[str, str], inner: Mapping[str, str]) -> str | None:
    """A tensor's name in the other layout, or None."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        stem, rest = ".".join(parts[:end]), parts[end:]
        if stem not in stems:
            continue
        if ".resnets." not in stem + stems[stem]:
            return ".".join([stems[stem], *rest])
        layer = inner.get(".".join(rest[:-1]))
        return None if layer is None else f"{stems[stem]}.{layer}.{rest[-1]}"
    return None
