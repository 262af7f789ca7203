"""`pocket-clip` as open_clip stores a model: `open_clip.create_model_from_pretrained("local-dir:DIR")`.

Both libraries hold the same network. open_clip keeps queries, keys and values of an attention in one matrix, and the
two projections transposed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PARTS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # transformers' own spelling
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "logit_scale": "logit_scale",
}
_TOWERS = {
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.encoder.layers": "transformer.resblocks",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def state_dict(clip: Any) -> dict[str, Tensor]:
    """Return the tensors of a transformers `CLIPModel` under open_clip's names."""
    theirs = dict(clip.state_dict())
    ours = {
        "visual.proj": theirs.pop("visual_projection.weight").T,
        "text_projection": theirs.pop("text_projection.weight").T,
    }
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in theirs.items():
        module, _, kind = name.rpartition(".")
        tower = next((t for t in _TOWERS if name.startswith(t)), None)
        if tower is None:
            ours[_PARTS[name] if name in _PARTS else f"{_PARTS[module]}.{kind}"] = tensor
            continue
        number, _, inner = module.removeprefix(f"{tower}.").partition(".")
        layer = f"{_TOWERS[tower]}.{number}"
        if inner in _LAYER:
            ours[f"{layer}.{_LAYER[inner]}.{kind}"] = tensor
        else:  # self_attn.q_proj, k_proj or v_proj
            packed.setdefault(f"{layer}.attn.in_proj_{kind}", {})[inner[-6]] = tensor
    ours |= {name: torch.cat([parts[k] for k in "qkv"]) for name, parts in packed.items()}
    return {name: tensor.contiguous() for name, tensor in ours.items()}


def config(clip: Any) -> dict[str, Any]:
    """Return open_clip's description of a `CLIPModel`."""
    vision, text = clip.config.vision_config, clip.config.text_config
    half = [0.5, 0.5, 0.5]
    return {
        "model_cfg": {
            "embed_dim": clip.config.projection_dim,
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "layers": vision.num_hidden_layers,
                "width": vision.hidden_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
                "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
                "mlp_ratio": text.intermediate_size / text.hidden_size,
                "hf_tokenizer_name": "pocket-clip",  # from a local folder open_clip takes the folder's own tokenizer
            },
        },
        "preprocess_cfg": {"mean": half, "std": half, "interpolation": "bicubic"},
    }


def save(clip: Any, folder: Path) -> None:
    """Write weights and description beside those of transformers; the tokenizer's files serve both libraries."""
    from safetensors.torch import save_file

    save_file(state_dict(clip), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config(clip), indent=2) + "\n", encoding="utf-8")
