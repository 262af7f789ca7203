"""LoRA on small models of the true classes, LLaVAs from parts, and what is written for other libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.llm_mm.assembly import assemble
from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import Conversation, Turn
from graft.llm_mm.data import DataConfig
from graft.llm_mm.llava import LlavaTuning
from graft.llm_mm.method import LanguageIA3, LanguageLoRA, LanguagePrefix, LanguagePrompt, sample_logits, save_base
from graft.llm_mm.parts import part_of
from graft.llm_mm.task import Reader
from graft.llm_mm.verification import compare
from graft.studio.adapter import Adapter, Card, base_hash
from graft.studio.config import to_dict
from graft.studio.errors import InputError
from graft.studio.pocket import models

SLOW = pytest.mark.slow
SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def rows(photos: Callable[[str], Path]) -> list[Conversation]:
    """A row with two pictures of different shapes, one with one, one without."""
    one, two = str(photos("a.png")), str(photos("b.png"))
    answer = Turn("assistant", ("red",))
    return [
        Conversation(1, (Turn("user", (0, 1, "which is it ?")), answer), (one, two)),
        Conversation(2, (Turn("user", (0, "is it ?")), answer), (two,)),
        Conversation(3, (Turn("user", ("is it ?",)), answer)),
    ]


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


def qwen() -> MultimodalBase:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    words = tokenizer(*marks)
    words.image_token = marks[0]
    ids = [words.convert_tokens_to_ids(mark) for mark in marks]
    config = Qwen2_5_VLConfig(
        text_config={
            **SIZE, "num_key_value_heads": 1, "vocab_size": len(words), "pad_token_id": words.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1],
        },
        image_token_id=ids[0], video_token_id=ids[1], vision_start_token_id=ids[2], vision_end_token_id=ids[3],
    )  # fmt: skip
    template = models.llava_processor().chat_template.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    images = Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64})
    processor = Qwen2_5_VLProcessor(images, words, Qwen2VLVideoProcessor(), chat_template=template)
    return MultimodalBase("qwen", Qwen2_5_VLForConditionalGeneration(config), processor)


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


@pytest.mark.parametrize("build", [llava_next, *(pytest.param(each, marks=SLOW) for each in (qwen, smolvlm))])
def test_lora_learns_on_models_of_the_true_classes(build: Callable[[], MultimodalBase], photos: Callable[[str], Path]):
    torch.manual_seed(0)
    base = build()
    reader = Reader.of(base, DataConfig(path="-"))
    batch, tokens = reader.batch(rows(photos))
    handle = LanguageLoRA(rank=2, towers=("language", "projector")).attach(base.model)
    assert {part_of(site.name) for site in handle.plan} == {"language", "projector"}

    def loss() -> torch.Tensor:
        logits, labels = reader.logits(batch, frozen_tower=True)
        return torch.nn.functional.cross_entropy(logits, labels)

    handle.probe(loss)
    optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=2e-2)
    start = loss()
    for _ in range(5):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < start.item() - 0.1
    # the same tokens as the processor's own
    row = rows(photos)[0]
    shown = [{"type": "image", "image": reader.store.open(picture)} for picture in row.pictures]
    theirs = base.processor.apply_chat_template(
        [[{"role": "user", "content": [*shown, {"type": "text", "text": "which is it ?"}]}]],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    assert theirs["input_ids"][0].tolist() == reader.writer.prompt(row.asking(), reader.store.expand)
    assert tokens[0].answers[0][0] == theirs["input_ids"].shape[1]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of small towers and of a small language model."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        SiglipImageProcessor,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**SIZE, image_size=32, patch_size=8)).save_pretrained(root / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(root / "clip")
    SiglipVisionModel(SiglipVisionConfig(**SIZE, image_size=32, patch_size=8)).save_pretrained(root / "siglip")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "siglip")
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **settings)
    (root / "timm").mkdir()
    described = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": settings,
                 "pretrained_cfg": {"input_size": [3, 32, 32]}}  # fmt: skip
    (root / "timm" / "config.json").write_text(json.dumps(described))
    save_file(model.state_dict(), root / "timm" / "model.safetensors", metadata={"format": "pt"})
    words = models.load_llava_tokenizer()
    LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=len(words))).save_pretrained(root / "llama")
    words.save_pretrained(root / "llama")
    return root


@pytest.mark.parametrize("projector", ["mlp", pytest.param("linear", marks=SLOW)])
@pytest.mark.parametrize("tower", [pytest.param("clip", marks=SLOW), "siglip", "timm"])
def test_parts_become_a_llava_that_transformers_loads(
    tower: str, projector: Any, parts: Path, tmp_path: Path, photos: Callable[[str], Path]
):
    base = assemble(str(parts / tower), str(parts / "llama"), projector)
    save_base(base, tmp_path / "llava")
    again = graft.load_base(str(tmp_path / "llava"), "cpu")
    assert isinstance(again, MultimodalBase) and again.is_llava
    torch.testing.assert_close(sample_logits(again), sample_logits(base), rtol=1e-4, atol=1e-5)
    reader = Reader.of(again, DataConfig(path="-"))
    batch, _ = reader.batch(rows(photos))
    assert int((batch.ids == reader.writer.image_id).sum()) == 3 * 16
    handle = LlavaTuning(stage=1).attach(again.model)
    handle.probe(lambda: torch.nn.functional.cross_entropy(*reader.logits(batch, frozen_tower=True)))
    whole, _ = reader.logits(batch, frozen_tower=False)
    torch.testing.assert_close(reader.logits(batch, frozen_tower=True)[0], whole, rtol=1e-3, atol=1e-4)


def test_other_towers_are_refused(parts: Path):
    with pytest.raises(InputError, match="its kind is llama"):
        assemble(str(parts / "llama"), str(parts / "llama"))
    with pytest.raises(InputError, match="the language model cannot be loaded"):
        assemble(str(parts / "clip"), str(parts / "none"))


def trained(base: MultimodalBase, method: Any, name: str) -> Adapter:
    """An adapter whose every number was moved; before that it changes nothing, if it is no prompt."""
    _ = base.hash  # before anything is attached
    plain = sample_logits(base)
    handle = method.attach(base.model)
    assert isinstance(method, LanguagePrompt | LanguagePrefix) or torch.equal(sample_logits(base), plain)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    card = Card(name, to_dict(method), "llm_mm", base.name, base.hash, handle.plan.to_list())
    adapter = Adapter(handle.tensors(), card)
    handle.detach()
    return adapter


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "llava"])
def test_peft_and_transformers_say_what_the_attached_adapter_says(name: str, tiny: Path, tmp_path: Path):
    from peft import PeftModel

    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    method = LanguageLoRA(rank=2, towers=("language", "vision")) if name == "lora" else LlavaTuning(rank=2)
    adapter = trained(base, method, name)
    plain = sample_logits(base)
    with adapter.attached(base):
        told = sample_logits(base)
    assert (told - plain).abs().max() > 1e-2 * plain.abs().max()
    torch.testing.assert_close(sample_logits(base), plain)
    adapter.export(tmp_path / "peft", "peft")
    theirs = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    PeftModel.from_pretrained(theirs.model, tmp_path / "peft").eval()
    torch.testing.assert_close(sample_logits(theirs), told, rtol=1e-3, atol=1e-3)
    adapter.export(tmp_path / "merged", "transformers")
    merged = graft.load_base(str(tmp_path / "merged"), "cpu")
    torch.testing.assert_close(sample_logits(merged), told, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "method",
    [
        LanguageLoRA(rank=2),
        pytest.param(LlavaTuning(rank=2), marks=pytest.mark.slow),
        pytest.param(LanguageIA3(), marks=pytest.mark.slow),
        pytest.param(LanguagePrompt(length=3), marks=pytest.mark.slow),
        pytest.param(LanguagePrefix(length=3, hidden=None), marks=pytest.mark.slow),
    ],
    ids=lambda method: type(method).__name__,
)
def test_verify_compares_with_peft(method: Any, tiny: Path, tmp_path: Path):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    names = {LanguageLoRA: "lora", LlavaTuning: "llava", LanguageIA3: "ia3", LanguagePrompt: "prompt_tuning"}
    adapter = trained(base, method, names.get(type(method), "prefix_tuning"))
    told = compare(base, adapter)
    assert isinstance(told, dict) and told["same"], told
    assert told["library"] == "peft" and told["error"] < 1e-3 and told["change"] > 1e-3
    if isinstance(method, LanguageLoRA):
        adapter.export(tmp_path, "peft")
        file = tmp_path / "adapter_model.safetensors"
        save_file({k: 2 * t if "lora_B" in k else t for k, t in load_file(file).items()}, file)
        told = compare(base, adapter, file)
        assert isinstance(told, dict) and not told["same"] and 0.1 < told["error"] < 10
    assert base_hash(base.modules) == base.hash


def test_what_peft_cannot_hold_is_refused(tiny: Path, tmp_path: Path):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    adapter = trained(base, LlavaTuning(language="full"), "llava")
    with pytest.raises(InputError, match="to peft this is no adapter"):
        adapter.export(tmp_path / "peft", "peft")
    assert "to peft this is no adapter" in str(compare(base, adapter))
