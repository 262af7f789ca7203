"""A random StableDiffusionPipeline of the true classes, small enough to train in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from graft.diffusion.base import DiffusionBase, load_base


def tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789<>_-.,"
    words = ["a", "photo", "of", "the", "red", "blue", "cat", "toy", "on"]
    vocab = {token: i for i, token in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    merges = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            vocab.setdefault(pieces[0], len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=24)


def pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    words = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=words, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline as a diffusers folder."""
    path = tmp_path_factory.mktemp("base")
    pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def xl(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline of Stable Diffusion XL as a diffusers folder: text encoders of different width, and the second
    one with the wrong end-of-text id that the real one has."""
    torch.manual_seed(0)
    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    def text(width: int, end: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=24, bos_token_id=words.bos_token_id, eos_token_id=end,
            pad_token_id=words.pad_token_id, projection_dim=12,
        )  # fmt: skip

    unet = UNet2DConditionModel(
        sample_size=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=40, attention_head_dim=8, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=8,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(text(16, words.eos_token_id)), tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(text(24, 2)), tokenizer_2=words, unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), add_watermarker=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("xl")
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def base(folder: Path) -> DiffusionBase:
    return load_base(str(folder))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five pictures of 24 x 16 pixels."""
    path = tmp_path / "photos"
    path.mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / f"{i}.png")
    return path


@pytest.fixture
def mapped(photos: Path) -> Path:
    """The photos with captions, and with maps of their size beside them."""
    (photos / "conditions").mkdir()
    for i in range(5):
        noise = np.random.default_rng(i + 10).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / "conditions" / f"{i}.png")
        (photos / f"{i}.txt").write_text(["a red cat", "the blue toy"][i % 2])
    return photos


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
