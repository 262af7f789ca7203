"""Small models with the processor of pocket-llava, and pictures and questions on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import graft
from graft.llm_mm.base import MultimodalBase
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
