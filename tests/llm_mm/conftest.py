"""Small models with the processor of pocket-llava or of their own class, and pictures and questions on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

import graft
from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import Conversation, Turn
from graft.studio.pocket import models
from graft.studio.runs import Run, open_run
from graft.studio.training import resume


@pytest.fixture(scope="module")
def base() -> MultimodalBase:
    found = graft.load_base("pocket-llava", device="cpu")
    assert isinstance(found, MultimodalBase)
    return found


@pytest.fixture
def photos(tmp_path: Path) -> Callable[[str], Path]:
    """Draws a picture of one colour under a name."""

    def draw(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = sum(name.encode()) % 200
        Image.fromarray(np.full((48, 64, 3), (shade, 255 - shade, 90), np.uint8)).save(path)
        return path

    return draw


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own for each test, but for the embedded models' folders."""
    monkeypatch.setattr("graft.studio.caches.default_root", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of the smallest size with the processor of pocket-llava, as a folder."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    processor = models.llava_processor()
    size = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**size, num_hidden_layers=3, image_size=64, patch_size=8),
            text_config=LlamaConfig(
                **size,
                num_hidden_layers=2,
                vocab_size=len(processor.tokenizer),
                pad_token_id=processor.tokenizer.pad_token_id,
                bos_token_id=processor.tokenizer.bos_token_id,
                eos_token_id=processor.tokenizer.eos_token_id,
            ),
            image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    folder = tmp_path_factory.mktemp("tiny") / "llava"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def resampled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a resampler of three queries."""
    import torch
    from transformers import AutoProcessor, LlavaConfig

    from graft.llm_mm.resampler import ResamplerLlava, ResamplerLlavaConfig

    told = LlavaConfig.from_pretrained(tiny).to_dict()
    told = {key: value for key, value in told.items() if key not in ("model_type", "architectures")}
    torch.manual_seed(0)
    model = ResamplerLlava(ResamplerLlavaConfig(**told, resampler_queries=3, resampler_blocks=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    processor = AutoProcessor.from_pretrained(tiny)
    processor.num_additional_image_tokens += 3 - 64
    folder = tmp_path_factory.mktemp("resampled") / "llava"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def resumed(tmp_path: Path) -> Callable[[Run], dict[str, Any]]:
    """Cuts a copy of a run of four steps behind its second, goes on with it, and returns what was learnt."""

    def go_on(whole: Run) -> dict[str, Any]:
        folder = tmp_path / f"{whole.folder.name}-cut"
        shutil.copytree(whole.folder, folder)
        cut = open_run(folder)
        shutil.rmtree(folder / "checkpoints" / "00000004")
        shutil.rmtree(folder / "result")
        (folder / "checkpoints" / "LATEST").write_text("00000002")
        cut.write_state(status="stopped")
        tensors: dict[str, Any] = resume(cut).adapter().tensors
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines if line["attempt"] == 2] == [3, 4]  # and not all four again
        return tensors

    return go_on


@pytest.fixture
def questions(photos: Callable[[str], Path], tmp_path: Path) -> Path:
    """Ten questions about ten pictures and two without a picture."""
    rows = [
        {"image": photos(f"{k}.png").name, "question": "is it red ?", "answer": "yes" if k % 2 else "no"}
        for k in range(10)
    ]
    rows += [{"question": f"count {word}", "answer": word} for word in ("one", "two")]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer(*marks: str) -> Any:
    found = models.load_llava_tokenizer()
    found.add_special_tokens({"additional_special_tokens": list(marks)})
    return found


def llava_next() -> MultimodalBase:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    words = tokenizer()
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32], [32, 16]]
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**SIZE, image_size=16, patch_size=8),
        text_config=LlamaConfig(**SIZE, vocab_size=len(words), pad_token_id=words.pad_token_id),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[16, 32], [32, 16]],
        image_seq_length=4,
    )
    processor = LlavaNextProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=models.llava_processor().chat_template,
    )  # fmt: skip
    return MultimodalBase("next", LlavaNextForConditionalGeneration(config), processor)


SEES: dict[str, dict[str, Any]] = {
    "Qwen2VL": {"embed_dim": 32, "mlp_ratio": 2},
    "Qwen2_5_VL": {"intermediate_size": 48, "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]},
    "Qwen3VL": {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0]},
}  # fmt: skip
"""What the towers of Qwen's families are told beside what they have in common."""


def qwen(family: str) -> MultimodalBase:
    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    words = tokenizer(*marks)
    words.image_token = marks[0]
    ids = [words.convert_tokens_to_ids(mark) for mark in marks]
    head = {"head_dim": 16} if family == "Qwen3VL" else {}
    config = getattr(transformers, f"{family}Config")(
        text_config={
            **SIZE, **head, "num_key_value_heads": 1, "vocab_size": len(words), "pad_token_id": words.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 8, **SEES[family]},
        image_token_id=ids[0], video_token_id=ids[1], vision_start_token_id=ids[2], vision_end_token_id=ids[3],
    )  # fmt: skip
    template = models.llava_processor().chat_template.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    images = transformers.Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64})
    videos = (transformers.Qwen3VLVideoProcessor if family == "Qwen3VL" else transformers.Qwen2VLVideoProcessor)()
    processor = getattr(transformers, f"{family}Processor")(images, words, videos, chat_template=template)
    return MultimodalBase(family, getattr(transformers, f"{family}ForConditionalGeneration")(config), processor)


def smolvlm() -> MultimodalBase:
    """With the processor of Idefics 3, which writes the same tokens: SmolVLM's own needs a package for numbers."""
    from transformers import Idefics3ImageProcessor, Idefics3Processor, SmolVLMConfig, SmolVLMForConditionalGeneration

    grid = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    words = tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *grid)
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **SIZE, "vocab_size": len(words), "pad_token_id": words.pad_token_id},
        vision_config={**SIZE, "image_size": 32, "patch_size": 8},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    images = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = models.llava_processor().chat_template
    processor = Idefics3Processor(images, words, image_seq_len=4, chat_template=template)
    return MultimodalBase("smolvlm", SmolVLMForConditionalGeneration(config), processor)


@pytest.fixture
def of_family() -> Callable[[str], MultimodalBase]:
    """Makes a small random model of a class of transformers, with its processor."""
    others = {"LlavaNext": llava_next, "SmolVLM": smolvlm}
    return lambda family: others[family]() if family in others else qwen(family)


@pytest.fixture
def conversations(photos: Callable[[str], Path]) -> list[Conversation]:
    """A row with two pictures of different shapes, one with one, one without."""
    one, two = str(photos("a.png")), str(photos("b.png"))
    answer = Turn("assistant", ("red",))
    return [
        Conversation(1, (Turn("user", (0, 1, "which is it ?")), answer), (one, two)),
        Conversation(2, (Turn("user", (0, "is it ?")), answer), (two,)),
        Conversation(3, (Turn("user", ("is it ?",)), answer)),
    ]
