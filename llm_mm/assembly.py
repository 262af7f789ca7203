"""A LLaVA from its parts: an image tower, a projector that has learnt nothing yet, and a language model.

The result is transformers' own `LlavaForConditionalGeneration`, which it loads without any code of ours: towers of CLIP
and SigLIP as they are, a plain ViT of timm as transformers' `ViTModel` with the same weights. The projector is LLaVA's:
two layers with GELU, or without it, which is a linear map. Train it alone first (`method = "llava"`, `stage = 1`).

With a resampler in the projector's place (`graft.llm_mm.resampler`) the folder is for `load_base` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from graft.llm_mm.base import MultimodalBase
from graft.studio.config import require
from graft.studio.errors import InputError

if TYPE_CHECKING:
    from graft.llm_mm.resampler import ResamplerSettings

IMAGE = "<image>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}USER: {{ message['content'] + ' ' }}"
    "{% else %}ASSISTANT:{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""For language models that have no chat template: Vicuna's form."""
REMEDY = "Give a folder or hub id of CLIP or SigLIP (transformers), or a plain ViT of timm"


def assemble(
    vision: str,
    language: str,
    projector: Literal["mlp", "linear", "resampler"] | ResamplerSettings = "mlp",
    layer: int = -2,
    seed: int = 0,
) -> MultimodalBase:
    """Returns a LLaVA of a tower and a language model; save it with `save_base`, then use its folder as a base.

    Args:
        vision: folder, hub id or embedded name of a CLIP or SigLIP of transformers, or of a ViT of timm.
        language: folder or hub id of a causal language model of transformers.
        projector: "mlp" is LLaVA 1.5's; "linear" is LLaVA 1.0's one map, as a product of two; "resampler" is one of
            64 queries, or of the shape that the settings say.
        layer: of the tower whose output is read; -2 is LLaVA's, the last but one.
        seed: of the projector.

    Raises:
        InputError: a part that cannot be loaded, or of another kind.
    """
    tower, images, classed = _tower(vision)
    words, tokenizer = _language(language)
    settings = tower.config
    last = settings.num_hidden_layers
    require("layer", layer, 1 <= (layer if layer >= 0 else last + 1 + layer) <= last, f"1 to {last}, or from -1 on")
    patches = (settings.image_size // settings.patch_size) ** 2
    kind, config_kind, shape = _projector(projector)
    count = shape.get("resampler_queries", patches)
    config = config_kind(
        vision_config=settings,
        text_config=words.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="linear" if projector == "linear" else "gelu",
        vision_feature_layer=layer,
        vision_feature_select_strategy="default" if classed else "full",
        image_seq_length=count,
        tie_word_embeddings=bool(words.config.tie_word_embeddings),
        **shape,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    model.model.vision_tower.load_state_dict(tower.state_dict(), strict=False)
    model.model.language_model.load_state_dict(words.model.state_dict())
    with torch.no_grad():
        model.lm_head.weight.copy_(words.get_output_embeddings().weight)
    processor = _processor(images, tokenizer, settings.patch_size, classed)
    processor.num_additional_image_tokens += count - patches  # it counts patches, and these beside them
    return MultimodalBase(f"{vision} + {language}", model, processor)


def _projector(projector: Any) -> tuple[Any, Any, dict[str, int]]:
    """Classes of the model and its config, and what the config is told of the projector beside LLaVA's own."""
    if projector in ("mlp", "linear"):
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        return LlavaForConditionalGeneration, LlavaConfig, {}
    from graft.llm_mm.resampler import ResamplerLlava, ResamplerLlavaConfig, ResamplerSettings

    shape = ResamplerSettings() if projector == "resampler" else projector
    known = isinstance(shape, ResamplerSettings)
    require("projector", projector, known, "mlp, linear, resampler, or ResamplerSettings")
    return ResamplerLlava, ResamplerLlavaConfig, {f"resampler_{name}": value for name, value in vars(shape).items()}


def _processor(images: Any, tokenizer: Any, patch: int, classed: bool) -> Any:
    from transformers import LlavaProcessor

    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default" if classed else "full",
        num_additional_image_tokens=int(classed),
        chat_template=tokenizer.chat_template or TEMPLATE,
        image_token=IMAGE,
    )


def _language(source: str) -> tuple[Any, Any]:
    """A language model and its tokenizer, which know the image token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        reason = f"the language model cannot be loaded ({str(error).splitlines()[0]})"
        raise InputError(source, reason, "Give a folder or hub id of a causal language model") from error
    if tokenizer.convert_tokens_to_ids(IMAGE) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def _tower(source: str) -> tuple[Any, Any, bool]:
    """A tower, its image processor, and whether its first token is no patch."""
    from transformers import AutoConfig, AutoImageProcessor, CLIPVisionModel, SiglipVisionModel

    if source.startswith(("timm/", "hf-hub:timm/", "local-dir:")) or _is_timm(source):
        return (*_from_timm(source), True)
    place = source
    if source.startswith("pocket-"):
        from graft.studio.pocket import resolve

        place = str(resolve(source))
    try:
        kind = AutoConfig.from_pretrained(place).model_type
        if kind not in ("clip", "clip_vision_model", "siglip", "siglip_vision_model"):
            raise InputError(source, f"its kind is {kind}", REMEDY)
        of: Any = CLIPVisionModel if kind.startswith("clip") else SiglipVisionModel
        tower = of.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
        return tower, AutoImageProcessor.from_pretrained(place), kind.startswith("clip")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(source, f"the tower cannot be loaded ({str(error).splitlines()[0]})", REMEDY) from error


def _is_timm(source: str) -> bool:
    config = Path(source).expanduser() / "config.json"
    return source.startswith("pocket-vit") or (
        config.is_file() and '"architecture"' in config.read_text(encoding="utf-8")
    )


def _from_timm(source: str) -> tuple[Any, Any]:
    """A plain ViT of timm as transformers' `ViTModel`, whose features are compared, and an image processor.

    Raises:
        InputError: another architecture, which `ViTModel` does not compute.
    """
    import timm
    from transformers import CLIPImageProcessor, ViTConfig, ViTModel

    name = source
    if source.startswith("pocket-"):
        from graft.studio.pocket import resolve

        name = str(resolve(source))
    name = f"local-dir:{name}" if Path(name).is_dir() else name
    name = f"hf-hub:{name}" if name.startswith("timm/") else name
    try:
        model: Any = timm.create_model(name, pretrained=True).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(source, f"the tower cannot be loaded ({str(error).splitlines()[0]})", REMEDY) from error
    patches: Any = getattr(model, "patch_embed", None)
    if type(model).__name__ != "VisionTransformer" or not hasattr(patches, "num_patches"):
        raise InputError(source, f"timm calls it a {type(model).__name__}", REMEDY)
    block, side = model.blocks[0], patches.img_size[0]
    config = ViTConfig(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        image_size=side,
        patch_size=patches.patch_size[0],
        layer_norm_eps=block.norm1.eps,
        qkv_bias=block.attn.qkv.bias is not None,
    )
    with torch.random.fork_rng(devices=[]):
        tower = ViTModel(config, add_pooling_layer=False).eval()
    x = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
    try:
        missing, unknown = tower.load_state_dict(_renamed(model.state_dict(), len(model.blocks)), strict=False)
        same = not missing and not unknown
    except (KeyError, RuntimeError):  # no class token, or others beside it
        same = False
    with torch.no_grad():
        same = same and torch.allclose(tower(x).last_hidden_state, model.forward_features(x), rtol=1e-3, atol=1e-3)
    if not same:
        raise InputError(source, "it is no plain ViT: transformers' ViTModel computes something else", REMEDY)
    told = timm.data.resolve_data_config({}, model=model)
    size = {"height": side, "width": side}
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size=size, image_mean=list(told["mean"]), image_std=list(told["std"])
    )
    return tower, images


def _renamed(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """timm's weights by the names of transformers' ViT."""
    found = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.position_embeddings": weights["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
        "layernorm.weight": weights["norm.weight"],
        "layernorm.bias": weights["norm.bias"],
    }
    pairs = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    for k in range(layers):
        for end in ("weight", "bias"):
            for ours, theirs in pairs.items():
                found[f"layers.{k}.{theirs}.{end}"] = weights[f"blocks.{k}.{ours}.{end}"]
            packed = weights.get(f"blocks.{k}.attn.qkv.{end}")
            for name, part in zip("qkv", () if packed is None else packed.chunk(3), strict=packed is not None):
                found[f"layers.{k}.attention.{name}_proj.{end}"] = part
    return found
