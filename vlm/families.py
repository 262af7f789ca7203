"""The families behind the one face: transformers' CLIP and SigLIP, and what open_clip builds.

Each function says where a library keeps the parts that `ClipBase` names: its tokenizer's marks, its preprocessing, the
image tower's last linear map, and the text tower's layers, mask and pooling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graft.studio.errors import InputError
from graft.vlm.base import ClipBase, Preprocess
from graft.vlm.text import TextTower, Words, open_clip_layers, transformers_layers


def hugging_face_words(
    tokenizer: Any, length: int, clean: Callable[[str], str] = lambda text: text, strip: bool = False
) -> Words:
    """Words of a tokenizer of transformers; those of BERT's kind call their marks cls and sep.

    Args:
        tokenizer: of transformers.
        length: positions of the text tower.
        clean: what is done to a text first.
        strip: write 0 in place of the sep mark, as open_clip does for CLIPA.
    """
    pad, sep = tokenizer.pad_token_id, tokenizer.sep_token_id

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(clean(text), truncation=False, verbose=False).input_ids
        return [0 if strip and i == sep else i for i in ids]

    start = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    end = sep if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return Words(encode, length, 0 if pad is None else pad, start, 0 if strip else end)


def transformers_preprocess(processor: Any) -> Preprocess:
    """The preprocessing that a transformers image processor describes."""
    from PIL import Image

    size = processor.size
    squash = size.get("shortest_edge") is None
    side = size["height"] if squash else size["shortest_edge"]
    crops = not squash and getattr(processor, "do_center_crop", False)
    if crops and processor.crop_size["height"] != side:
        reason = f"it resizes to {side} and cuts out {processor.crop_size['height']} pixels, which is not supported"
        raise InputError("its image processor", reason, "Save a processor whose two sizes are equal")
    resample = Image.Resampling(int(getattr(processor, "resample", 3))).name.lower()
    return Preprocess(int(side), tuple(processor.image_mean), tuple(processor.image_std), resample, squash)


def from_transformers(name: str, model: Any, words: Words, preprocess: Preprocess) -> ClipBase:
    """The base of a transformers `CLIPModel` or `SiglipModel`."""
    if next(model.parameters()).device.type == "cpu":
        # On a CPU the fused attention takes about twice as long in training, for sequences of this length.
        model.set_attn_implementation("eager")
    text, vision, siglip = model.text_model, model.vision_model, model.config.model_type == "siglip"
    text = getattr(text, "text_model", text)  # one level deeper before transformers 5
    end = model.config.text_config.eos_token_id

    def at(ids: Tensor) -> Tensor:
        if siglip:
            return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        # 2 is what old configurations say by mistake; there the end mark is the largest id.
        return ids.argmax(-1) if end == 2 else ids.eq(end).int().argmax(-1)

    project = text.head if siglip else model.text_projection
    tower = TextTower(
        embed=text.embeddings.token_embedding,
        positions=text.embeddings.position_embedding.weight,
        layers=transformers_layers(text.encoder),
        finish=lambda x: project(text.final_layer_norm(x)),
        at=at,
        causal=not siglip,
        cuttable=not siglip,
    )
    return ClipBase(
        name,
        model,
        words,
        preprocess,
        lambda pixels: vision(pixel_values=pixels.to(model.dtype)).pooler_output,
        None if siglip else lambda: model.visual_projection.weight.T,
        tower,
        vision,
    )


def open_clip_words(tokenizer: Any) -> Words:
    """Words of a tokenizer of open_clip.

    Raises:
        InputError: it makes other rows of a text than these words do.
    """
    if hasattr(tokenizer, "tokenizer"):
        strip = bool(getattr(tokenizer, "strip_sep_token", False))
        clean = getattr(tokenizer, "clean_fn", lambda text: text)
        words = hugging_face_words(tokenizer.tokenizer, tokenizer.context_length, clean, strip)
    else:
        start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
        words = Words(lambda text: [start, *tokenizer.encode(text), end], tokenizer.context_length, 0, start, end)
    probe = ["A photo."]
    if words(probe).tolist() != tokenizer(probe).tolist():  # features would be wrong without an error
        reason = "it marks, cleans or fills texts in a way that is not known here"
        raise InputError(f"open_clip's {type(tokenizer).__name__}", reason, "Use a model with another tokenizer")
    return words


def open_clip_preprocess(model: Any) -> Preprocess:
    """The preprocessing that open_clip keeps with a model."""
    from open_clip.model import get_model_preprocess_cfg

    config = get_model_preprocess_cfg(model)
    size = config["size"]
    side = size if isinstance(size, int) else size[0]
    mode = config.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise InputError("its preprocessing", f"resize_mode {mode!r} is not supported", "Use shortest or squash")
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Preprocess(side, mean, std, config.get("interpolation", "bicubic"), mode == "squash")


def from_open_clip(name: str, model: Any, words: Words, preprocess: Preprocess) -> ClipBase:
    """The base of an open_clip `CLIP` or `CustomTextCLIP`."""
    features, last = _open_clip_image(model.visual)

    def pool(pixels: Tensor) -> Tensor:
        return features(pixels.to(next(model.visual.parameters()).dtype))

    return ClipBase(name, model, words, preprocess, pool, last, _open_clip_text(model), model.visual)


def _open_clip_image(visual: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[], Tensor] | None]:
    """The image tower up to its last linear map, and that map."""
    proj = getattr(visual, "proj", None)
    if isinstance(proj, Tensor) and hasattr(visual, "_pool"):
        return lambda pixels: visual._pool(visual.transformer(visual._embeds(pixels)))[0], lambda: visual.proj
    linear = getattr(getattr(visual, "head", None), "proj", None)
    if isinstance(linear, nn.Linear) and linear.bias is None and set(visual.head._modules) <= {"drop", "proj"}:
        return visual.trunk, lambda: linear.weight.T
    return visual, None


def _open_clip_text(model: Any) -> TextTower | None:
    text = getattr(model, "text", model)
    kind = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    known = hasattr(text, "transformer") and hasattr(getattr(text, "transformer", None), "resblocks")
    if not known or getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        return None  # Hugging Face towers, and CoCa, which appends a token of its own
    projection = text.text_projection
    end = int(getattr(text, "eos_id", getattr(text, "text_eos_id", None)) or -1)
    rules: dict[str, Callable[[Tensor], Tensor]] = {
        "first": lambda ids: ids.new_zeros(len(ids)),
        "last": lambda ids: ids.new_full((len(ids),), ids.shape[1] - 1),
        "argmax": lambda ids: ids.argmax(-1),
        "eos": lambda ids: (ids - end).eq(0).int().argmax(-1),
    }
    if kind not in rules:
        return None

    def finish(x: Tensor) -> Tensor:
        x = text.ln_final(x)
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection

    causal = text.attn_mask is not None
    return TextTower(
        embed=text.token_embedding,
        positions=text.positional_embedding,
        layers=open_clip_layers(text.transformer),
        finish=finish,
        at=rules[kind],
        causal=causal,
        cuttable=causal and kind in ("argmax", "eos"),
    )
