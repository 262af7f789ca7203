"""One tiny randomly initialised model per family, and a folder of pictures in three classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.coca_model import CoCa, MultimodalCfg
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from graft.vlm.base import ClipBase, Preprocess
from graft.vlm.families import from_open_clip, from_transformers, hugging_face_words, open_clip_words

HALF = (0.5, 0.5, 0.5)
PREPROCESS = Preprocess(16, HALF, HALF)
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LENGTH = 24


def clip_tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789<>_-.,"
    vocab = {token: i for i, token in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    merges = []
    for word in ("a", "photo", "of", "the", "red", "cat", "dog"):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            vocab.setdefault(pieces[0], len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def siglip_tokenizer() -> PreTrainedTokenizerFast:
    """Letters as tokens, no start mark, an end mark that also fills up; punctuation dropped, as SigLIP's does."""
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(".", "")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def transformers_clip(
    width: int = 16, layers: int = 2, vision: dict[str, Any] = VISION, length: int = LENGTH
) -> ClipBase:
    words = clip_tokenizer()
    text = {
        "vocab_size": len(words), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": 2, "max_position_embeddings": length, "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    picture = {**vision, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=picture, projection_dim=width))
    return from_transformers("tiny", model, hugging_face_words(words, length), PREPROCESS)


def transformers_siglip() -> ClipBase:
    text = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 32, "projection_size": 16, "bos_token_id": 38, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**VISION, "image_size": 16, "patch_size": 8}))
    return from_transformers("tiny", model, hugging_face_words(siglip_tokenizer(), 32), PREPROCESS)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Letters as tokens between BERT's marks, which are no start and end marks by name; a stop is a token."""
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz."])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")]
    )
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )


def of_open_clip(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> HFTokenizer:
    """A tokenizer of Hugging Face as open_clip wraps it."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return HFTokenizer(folder, context_length=LENGTH, **settings)


@cache
def simple_tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=LENGTH)


def open_clip_model(
    custom: bool = False,
    vision: dict[str, Any] | None = None,
    words: Callable[[], Any] = simple_tokenizer,
    trunk: str = "",
    **text: Any,
) -> ClipBase:
    """A tiny model of open_clip; `trunk` puts one of timm, whose head ends in the common space, in the image tower."""
    picture = CLIPVisionCfg(
        **(vision or {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16})
    )
    tokenizer = words()
    size = {"context_length": LENGTH, "vocab_size": 49408 if hasattr(tokenizer, "encode") else 40}
    settings = CLIPTextCfg(**size, width=16, heads=2, layers=2, **text)
    kind = CustomTextCLIP if custom else CLIP
    model: Any = kind(embed_dim=16, vision_cfg=picture, text_cfg=settings)
    if trunk:
        model.visual.trunk, model.visual.head = timm.create_model(trunk, num_classes=16, **TRUNK), nn.Sequential()
        model.visual.image_size = (16, 16)
    return from_open_clip("tiny", model, open_clip_words(tokenizer), _preprocess(model.visual))


def _preprocess(visual: Any) -> Preprocess:
    size: Any = visual.image_size
    return Preprocess(size[0] if isinstance(size, tuple) else size, HALF, HALF)


def coca() -> ClipBase:
    """Text features come from a token behind the text; the image tower pools by attention."""
    vision = CLIPVisionCfg(
        layers=2, width=16, head_width=8, patch_size=8, image_size=16, attentional_pool=True, attn_pooler_heads=2,
        output_tokens=True,
    )  # fmt: skip
    text = CLIPTextCfg(
        context_length=LENGTH, vocab_size=49408, width=16, heads=2, layers=2, embed_cls=True, output_tokens=True
    )
    decoder = MultimodalCfg(context_length=LENGTH, vocab_size=49408, width=16, heads=2, layers=1, attn_pooler_heads=2)
    model = CoCa(16, decoder, text, vision)
    words = open_clip_words(simple_tokenizer())
    return from_open_clip("tiny", model, words, _preprocess(model.visual))


def hugging_face_text() -> ClipBase:
    """A text tower of Hugging Face inside open_clip, whose output is the mean over the text."""
    words, picture = of_open_clip(bert_tokenizer()), CLIPVisionCfg(2, 16, 8, patch_size=8, image_size=16)
    settings: dict[str, Any] = {"hf_model_pretrained": False, "hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"}
    with TemporaryDirectory() as folder:
        config = BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=LENGTH,
        )  # fmt: skip
        config.save_pretrained(folder)
        text = CLIPTextCfg(context_length=LENGTH, hf_model_name=folder, **settings)
        model: Any = CustomTextCLIP(embed_dim=16, vision_cfg=picture, text_cfg=text)
    return from_open_clip("tiny", model, open_clip_words(words), _preprocess(model.visual))


TRUNK = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
FAMILIES: dict[str, Callable[[], ClipBase]] = {
    "transformers CLIP": transformers_clip,
    "transformers SigLIP": transformers_siglip,
    "open_clip CLIP": open_clip_model,
    "open_clip text tower": lambda: open_clip_model(True),
    "EVA-CLIP": lambda: open_clip_model(True, TIMM, trunk="eva02_base_patch16_clip_224"),
    "SigLIP of open_clip": lambda: open_clip_model(
        True, TIMM, lambda: of_open_clip(siglip_tokenizer(), clean="canonicalize"), no_causal_mask=True,
        pool_type="last", proj_bias=True,
    ),
    "MobileCLIP": lambda: open_clip_model(True, no_causal_mask=True),
    "CLIPA": lambda: open_clip_model(
        vision={"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16, "no_ln_pre": True,
                "pool_type": "avg", "final_ln_after_pool": True},
        words=lambda: of_open_clip(bert_tokenizer(), strip_sep_token=True), no_causal_mask=True, pool_type="last",
    ),
    "ResNet": lambda: open_clip_model(vision={"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}),
}  # fmt: skip
"""Those whose text tower is known in parts."""
OTHERS: dict[str, Callable[[], ClipBase]] = {
    "EVA-CLIP, first": lambda: open_clip_model(True, TIMM, trunk="eva_giant_patch14_clip_224"),
    "SigLIP, pooled by attention": lambda: open_clip_model(
        True, TIMM, lambda: of_open_clip(siglip_tokenizer(), clean="canonicalize"),
        trunk="vit_base_patch16_siglip_224", no_causal_mask=True, pool_type="last", proj_bias=True,
    ),
    "CoCa": coca,
    "text tower of Hugging Face": hugging_face_text,
}  # fmt: skip
"""With text towers as above, or one that only its library can run."""
CUTTABLE = {"transformers CLIP", "open_clip CLIP", "open_clip text tower", "EVA-CLIP", "ResNet"}


@cache
def family(name: str) -> ClipBase:
    """A model of a family with weights that are large enough to matter; made once."""
    torch.manual_seed(0)
    base = (FAMILIES | OTHERS)[name]()
    with torch.no_grad():
        for parameter in base.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return base


@pytest.fixture
def base() -> ClipBase:
    return family("transformers CLIP")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLIP as a folder of transformers, tokenizer and image processor with it."""
    folder = tmp_path_factory.mktemp("base")
    family("transformers CLIP").model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size, image_mean=HALF, image_std=HALF).save_pretrained(
        folder
    )
    return folder


def picture(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Classes cat, dog and red_cat: six training and two test pictures each; a class has a tint of its own."""
    root = tmp_path / "photos"
    for label, name in enumerate(("cat", "dog", "red_cat")):
        for part, count in (("train", 6), ("test", 2)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = np.asarray(picture(100 * label + 10 * k + len(part))) // 2
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / f"{k}.png")
    return root


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=list(FAMILIES))
def kind(request: pytest.FixtureRequest) -> str:
    """Name of a family."""
    return str(request.param)


@pytest.fixture
def any_base(kind: str) -> ClipBase:
    """The base of a family."""
    return family(kind)


@pytest.fixture
def cuttable(kind: str) -> bool:
    """Whether the padding of the family's texts can be left out."""
    return kind in CUTTABLE


@pytest.fixture
def make() -> Callable[..., ClipBase]:
    """Makes a transformers CLIP of other sizes."""
    return transformers_clip


@pytest.fixture
def make_open_clip() -> Callable[..., ClipBase]:
    """Makes an open_clip model of other settings."""
    return open_clip_model


@pytest.fixture
def of() -> Callable[[str], ClipBase]:
    """A model of a family by its name."""
    return family


@pytest.fixture(params=[*FAMILIES, *OTHERS])
def of_every_kind(request: pytest.FixtureRequest) -> tuple[str, ClipBase]:
    """Name of a family and its base, also of those whose text tower only their library can run."""
    name = str(request.param)
    return name, family(name)


@pytest.fixture
def bert_words() -> HFTokenizer:
    """CLIPA's kind of tokenizer."""
    return of_open_clip(bert_tokenizer(), strip_sep_token=True)


@pytest.fixture
def siglip_words() -> PreTrainedTokenizerFast:
    """SigLIP's kind of tokenizer, as transformers has it."""
    return siglip_tokenizer()
