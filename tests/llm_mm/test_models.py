"""LoRA on small models of the true classes, LLaVAs from parts, and what is written for other libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import graft
from graft.llm_mm.assembly import assemble
from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import Conversation, Turn
from graft.llm_mm.data import DataConfig, read_rows
from graft.llm_mm.evaluation import measured, rotated
from graft.llm_mm.jobs import checked
from graft.llm_mm.llama_adapter import LlamaAdapter
from graft.llm_mm.llama_adapter_multimodal import MultimodalLlamaAdapter
from graft.llm_mm.llama_adapter_v2 import LlamaAdapterV2
from graft.llm_mm.llava import LlavaTuning
from graft.llm_mm.method import (
    LanguageIA3,
    LanguageLoRA,
    LanguagePrefix,
    LanguagePrompt,
    model_inputs,
    sample_logits,
    save_base,
    save_merged,
)
from graft.llm_mm.packing import check_packing, together
from graft.llm_mm.parts import part_of
from graft.llm_mm.pictures import PictureStore
from graft.llm_mm.resampler import ResamplerSettings
from graft.llm_mm.task import Reader
from graft.llm_mm.verification import compare
from graft.studio.adapter import Adapter, Card, base_hash
from graft.studio.caches import Cache
from graft.studio.config import to_dict
from graft.studio.errors import DataError, GraftError, InputError, SiteError
from graft.studio.pocket import models
from graft.studio.registry import domain_of_base
from graft.studio.runs import Run
from graft.studio.training import train

SLOW = pytest.mark.slow
WHITE = np.full((40, 40, 3), 255, np.uint8)
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


FAMILIES: dict[str, Callable[[], MultimodalBase]] = {
    "LlavaNext": llava_next, "SmolVLM": smolvlm, **{family: partial(qwen, family) for family in SEES},
}  # fmt: skip


@pytest.mark.parametrize(
    "family", [each if each == "LlavaNext" else pytest.param(each, marks=SLOW) for each in FAMILIES]
)
def test_lora_learns_on_models_of_the_true_classes(family: str, photos: Callable[[str], Path]):
    torch.manual_seed(0)
    base = FAMILIES[family]()
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
    words, _ = reader.batch([rows(photos)[2]] * 2)  # a batch without a picture
    assert torch.isfinite(reader.logits(words, frozen_tower=True)[0]).all()
    # the same tokens as the processor's own
    row = rows(photos)[0]
    shown = [{"type": "image", "image": reader.store.open(picture)} for picture in row.pictures]
    theirs = base.processor.apply_chat_template(
        [[{"role": "user", "content": [*shown, {"type": "text", "text": "which is it ?"}]}]],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    assert theirs["input_ids"][0].tolist() == reader.writer.prompt(row.asking(), reader.store.expand)
    assert tokens[0].answers[0][0] == theirs["input_ids"].shape[1]


@pytest.mark.parametrize("family", [each if each == "SmolVLM" else pytest.param(each, marks=SLOW) for each in FAMILIES])
@pytest.mark.parametrize("method", [LlamaAdapter(num_tokens=3), LlamaAdapterV2(num_tokens=2, fusion="none")])
@torch.no_grad()
def test_llama_adapter_acts_inside_models_that_read_pictures(family: str, method: Any, photos: Callable[[str], Path]):
    """On the language model alone: the same bits at the start, and then a generation with its cache as without."""
    torch.manual_seed(0)
    base = FAMILIES[family]()
    for weight in base.model.parameters():
        weight.mul_(4 if weight.dim() > 1 else 1)
    reader = Reader.of(base, DataConfig(path="-"))
    batch, _ = reader.batch(rows(photos))
    plain, _ = reader.logits(batch, False)
    handle = method.attach(base.model)
    assert {part_of(site.name) for site in handle.plan} == {"language"}
    assert torch.equal(reader.logits(batch, False)[0], plain)
    for name, parameter in handle.bank.named_parameters():
        parameter.add_(torch.randn_like(parameter), alpha=1.0 if name.endswith(".g") else 0.1)
    assert (reader.logits(batch, False)[0] - plain).abs().max() > 1e-2
    settings = {"do_sample": False, "max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    for row in (rows(photos)[0], rows(photos)[2]):
        ids = torch.tensor([reader.writer.prompt(row.asking(), reader.store.expand)])
        inputs = model_inputs(base, ids, torch.ones_like(ids), reader.store.inputs(row.pictures))
        told = [base.model.generate(**inputs, **settings, use_cache=cache) for cache in (True, False)]
        assert torch.equal(told[0].sequences, told[1].sequences)
        torch.testing.assert_close(*(torch.stack(each.logits) for each in told), rtol=1e-4, atol=1e-4)
    handle.detach()
    assert torch.equal(reader.logits(batch, False)[0], plain)


@pytest.mark.parametrize("family", [each if each == "Qwen3VL" else pytest.param(each, marks=SLOW) for each in SEES])
@torch.no_grad()
def test_prompts_stand_before_rows_whose_positions_turn(family: str, photos: Callable[[str], Path]):
    """Against the decoder itself, called with the longer rows; positions of pictures' rows and columns move along."""
    torch.manual_seed(0)
    base, given = qwen(family), list[dict[str, Any]]()
    for weight in base.model.parameters():
        weight.mul_(4 if weight.dim() > 1 else 1)
    reader = Reader.of(base, DataConfig(path="-"))
    (batch, _), decoder = reader.batch(rows(photos)), base.model.model.language_model
    hook = decoder.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    plain, _ = reader.logits(batch, False)
    hook.remove()
    (call,), (b, _, d) = given, given[0]["inputs_embeds"].shape
    P, places = torch.randn(3, d), call["position_ids"]
    first = torch.arange(3).expand(*places.shape[:-1], 3)
    longer = {
        "inputs_embeds": torch.cat([P.expand(b, -1, -1), call["inputs_embeds"]], 1),
        "position_ids": torch.cat([first, places + 3], -1),
        "attention_mask": torch.cat([torch.ones(b, 3, dtype=torch.long), batch.mask], 1),
    }
    if call.get("visual_pos_masks") is not None:
        longer["visual_pos_masks"] = torch.cat([torch.zeros(b, 3, dtype=torch.bool), call["visual_pos_masks"]], 1)
    hidden = decoder(**{**call, **longer}).last_hidden_state[:, 3:]
    want = base.model.lm_head(hidden[:, :-1][batch.labels[:, 1:] != -100])
    handle = LanguagePrompt(length=3).attach(base.model)
    handle.load({"model.language_model.P": P})
    found, _ = reader.logits(batch, False)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 0.1
    settings = {"do_sample": False, "max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    for row in (rows(photos)[0], rows(photos)[2]):
        ids = torch.tensor([reader.writer.prompt(row.asking(), reader.store.expand)])
        inputs = model_inputs(base, ids, torch.ones_like(ids), reader.store.inputs(row.pictures))
        told = [base.model.generate(**inputs, **settings, use_cache=cache).logits for cache in (True, False)]
        torch.testing.assert_close(*map(torch.stack, told), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_picture_of_another_row_may_have_more_tokens(tmp_path: Path):
    """Asked with it, a row that just fits is longer than `data.length`, and is asked all the same."""
    base, answer = llava_next(), Turn("assistant", ("red",))
    for name, width in (("small", 16), ("large", 64)):
        Image.new("RGB", (width, 16), "red").save(tmp_path / f"{name}.png")
    asked = {"small": "which is red , this one or that one ?", "large": "is it ?"}
    small, large = (
        Conversation(1, (Turn("user", (0, text)), answer), (str(tmp_path / f"{name}.png"),))
        for name, text in asked.items()
    )
    whole = Reader.of(base, DataConfig(path="-"))
    counts = [len(whole.tokens(row).ids) for row in (small, large)]
    turned = [len(whole.tokens(row).ids) for row in rotated(whole, [small, large])]
    assert max(turned) > max(counts)
    limited = Reader.of(base, DataConfig(path="-", length=max(counts)))
    assert measured(limited, [small, large]) == measured(whole, [small, large])


@pytest.mark.parametrize(
    "family", ["Llava", *(each if each == "Qwen3VL" else pytest.param(each, marks=SLOW) for each in FAMILIES)]
)
def test_packed_conversations_are_those_that_stand_alone(family: str, tiny: Path, photos: Callable[[str], Path]):
    """Loss of each and the gradients of all, in one row and in a row for each; pictures whole and in their places."""
    torch.manual_seed(0)
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm") if family == "Llava" else FAMILIES[family]()
    reader, given = Reader.of(base, DataConfig(path="-"), Cache()), rows(photos)
    with torch.no_grad():  # a model as drawn hardly minds where a token stands
        for weight in base.model.parameters():
            weight.mul_(4 if weight.dim() > 1 and family != "Llava" else 1)
    handle = LanguageLoRA(rank=2, towers=("language", "projector")).attach(base.model)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    check_packing(reader, given, handle.plan, 100)

    def told(rows: list[Conversation], most: int, frozen: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The losses of the conversations, and the gradients of their sum."""
        batches = [reader.batch(rows, most)[0]] if most else [reader.batch([row])[0] for row in rows]
        told = [reader.logits(batch, frozen) for batch in batches]
        logits, labels = (torch.cat(each) for each in zip(*told, strict=True))
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").view(len(rows), -1).sum(1)
        return losses.detach(), list(torch.autograd.grad(losses.sum(), list(handle.bank.parameters())))

    lengths = [len(reader.tokens(row).ids) for row in given]
    assert lengths == sorted(lengths, reverse=True)  # as they are packed
    for frozen in (True, False):
        alone, want = told(given, 0, frozen)
        for most, count in ((sum(lengths), 1), (lengths[0], 2)):
            batch = reader.batch(given, most)[0]
            assert batch.ids.shape == (count, most)
            assert batch.pictures == (given[0].pictures + given[1].pictures)
            packed, found = told(given, most, frozen)
            torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
            for one, other in zip(found, want, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_prompts_behind_gates_are_seen_by_every_packed_conversation(tiny: Path, photos: Callable[[str], Path]):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    reader, given = Reader.of(base, DataConfig(path="-"), Cache()), rows(photos)
    handle = LlamaAdapter(num_tokens=3, layers=2).attach(base.model)
    for parameter in handle.bank.parameters():
        parameter.normal_()
    check_packing(reader, given, handle.plan, 300)
    apart, packed = (reader.logits(reader.batch(given, most)[0], True)[0] for most in (0, 300))
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["LlavaNext", "Qwen2_5_VL", pytest.param("Qwen3VL", marks=SLOW)])
@torch.no_grad()
def test_a_projector_drawn_anew_has_its_norms_at_one(family: str):
    base = FAMILIES[family]()
    own = dict(base.model.named_parameters())
    before = {name: weight.clone() for name, weight in own.items()}
    norms = {f"{n}.weight" for n, part in base.model.named_modules() if "Norm" in type(part).__name__}
    handle = LlavaTuning(stage=1, fresh=True).attach(base.model)
    for name in handle.tensors():
        own[name].fill_(7)
    handle.reset(0, 0)
    found = {name: own[name] for name in handle.tensors()}
    assert {part_of(name) for name in found} == {"projector"}
    for name, weight in found.items():
        if name in norms:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif name.endswith("bias"):
            assert not weight.any(), name
        else:  # as long as torch's own linear layer, or a token of the language model
            limit = 1.0 if weight.dim() == 1 else weight.shape[1] ** -0.5
            assert 0.1 * limit < weight.abs().max() <= limit and not torch.equal(weight, before[name]), name
    assert bool(norms & set(found)) == (family != "LlavaNext")
    assert all(torch.equal(own[name], before[name]) for name in own if name not in found)


def test_pictures_in_tiles_are_no_prompt():
    """Refused when it is attached, not at the first step."""
    with pytest.raises(SiteError, match="shows a picture as several tiles.*use llama_adapter or lora"):
        MultimodalLlamaAdapter(num_tokens=2).attach(llava_next().model)
    with pytest.raises(SiteError, match="reads no pictures, or in a form that is not known.*as Llava"):
        MultimodalLlamaAdapter(num_tokens=2).plan(smolvlm().model)


def test_what_cannot_be_packed_is_refused(tiny: Path, photos: Callable[[str], Path]):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    reader, given = Reader.of(base, DataConfig(path="-")), rows(photos)
    for method, why in (
        (LanguagePrefix(length=2), "begins every row with what it trains"),
        (LanguagePrompt(length=2), "begins every row with what it trains"),
        (MultimodalLlamaAdapter(num_tokens=2), "shows a row's pictures to all"),
    ):
        with pytest.raises(InputError, match=f"data.packing = 90: this method {why}.*data.packing = 0"):
            check_packing(reader, given, method.plan(base.model), 90)
    forward = base.model.forward
    base.model.forward = lambda position_ids=None, **rest: forward(**rest)
    with pytest.raises(InputError, match="LlavaForConditionalGeneration lets conversations of one row see each other"):
        check_packing(reader, given, (), 90)
    assert together([5, 3, 9, 4, 20], 10) == [[4], [2], [0, 3], [1]]


@pytest.mark.parametrize("family", ["Llava", "LlavaNext", pytest.param("Qwen2VL", marks=pytest.mark.slow)])
def test_no_picture_is_decoded_to_count_its_tokens_and_broken_ones_are_told(
    family: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The header tells the size, upright and padded; a file that is no picture stops the job with its row."""
    base: Any = graft.load_base(str(tiny), "cpu", domain="llm_mm") if family == "Llava" else FAMILIES[family]()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "wide.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "square.png")
    Image.new("RGB", (64, 32)).save(tmp_path / "turned.jpg", exif=turned)
    names = ["wide.png", "turned.jpg", "square.png"]
    for fit in ("crop", "pad"):
        reader = Reader.of(base, DataConfig(path="-", fit=fit))  # type: ignore[arg-type]
        pictures = [reader.store.open(str(tmp_path / name)) for name in names]
        assert [reader.store.size(str(tmp_path / name)) for name in names] == [picture.size for picture in pictures]
        wanted = [reader.store._expanded(picture) for picture in pictures]
        with monkeypatch.context() as patch:
            patch.setattr(PictureStore, "open", lambda *args: pytest.fail("a picture was decoded"))
            assert [reader.store.expand(str(tmp_path / name)) for name in names] == wanted
        assert (len(set(map(tuple, wanted))) > 1) == (family != "Llava" and fit == "crop")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "small.png").write_bytes((tmp_path / "wide.png").read_bytes()[:20])
    table = [{"image": name, "question": "is it ?", "answer": "no"} for name in ("wide.png", "text.png", "small.png")]
    (tmp_path / "rows.json").write_text(json.dumps(table))
    found = read_rows(DataConfig(path=str(tmp_path / "rows.json"), validation=0, test=0))
    with pytest.raises(
        DataError, match=r"(?s)2 of 3 rows cannot be used.*row 2: .*text.png: not a pic.*row 3: .*small"
    ):
        checked(reader, found)
    with pytest.raises(DataError, match="none.png: there is no such file"):
        reader.store.open(str(tmp_path / "none.png"))


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


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_each_family_is_trained_and_merged_by_a_job(family: str, tmp_path: Path, questions: Path):
    """From the folder that transformers saved to the one that it loads: rows with pictures and without, packed too."""
    torch.manual_seed(0)
    save_base(FAMILIES[family](), tmp_path / "base")
    assert domain_of_base(str(tmp_path / "base")) == "llm_mm"
    job = {
        "base": str(tmp_path / "base"),
        "domain": "llm_mm",
        "method": {"name": "lora", "rank": 2, "towers": ["language", "projector", "vision"]},
        "data": {"path": str(questions), "validation": 0.2, "test": 0.2, "packing": 200},
        "train": {"steps": 3, "batch_size": 4, "learning_rate": 0.02, "device": "cpu", "threads": 1, "log_every": 1},
    }
    run = train(job, tmp_path / "run")
    parts = {part_of(name) for name in run.adapter().tensors}
    assert parts == {"language", "projector", "vision"}
    base = graft.load_base(job["base"], "cpu")  # type: ignore[arg-type]
    assert isinstance(base, MultimodalBase)
    plain = sample_logits(base)
    with run.adapter().attached(base):
        told = sample_logits(base)
    assert (told - plain).abs().max() > 1e-3 * plain.abs().max()
    run.adapter().export(tmp_path / "merged", "transformers")
    torch.testing.assert_close(
        sample_logits(graft.load_base(str(tmp_path / "merged"), "cpu")), told, rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["LlavaNext", "SmolVLM", "Qwen3VL"])
def test_both_stages_of_each_family_resume_with_the_same_bits(
    family: str, tmp_path: Path, questions: Path, resumed: Callable[[Run], dict[str, Any]]
):
    """A projector drawn anew, and LoRA of language and tower from there; the projector is whole in both files."""
    torch.manual_seed(0)
    save_base(FAMILIES[family](), tmp_path / "base")
    made: dict[str, Any] = {
        "base": str(tmp_path / "base"),
        "domain": "llm_mm",
        "data": {"path": str(questions), "validation": 0.2, "test": 0.2},
        "train": {"steps": 4, "batch_size": 4, "device": "cpu", "threads": 1, "log_every": 1, "checkpoint_every": 2},
    }
    method: dict[str, Any] = {"name": "llava", "rank": 2, "vision": "lora", "projector_rate": 1e-2}
    first = train({**made, "method": {"name": "llava", "stage": 1, "fresh": True}}, tmp_path / "first")
    second = train({**made, "method": {**method, "start": str(first.folder)}}, tmp_path / "second")
    for run, parts in ((first, {"projector"}), (second, {"vision", "projector", "language"})):
        whole, cut = run.adapter().tensors, resumed(run)
        assert {part_of(name) for name in whole} == parts
        assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    projector = {name for name in first.adapter().tensors if part_of(name) == "projector"}
    assert projector == {name for name in second.adapter().tensors if part_of(name) == "projector"}


@torch.no_grad()
def test_a_picture_is_cropped_or_padded_as_transformers_does_it(tiny: Path):
    """A wide picture with red ends: cropped, they are gone; padded, all of it is there, on the mean colour."""
    wide = np.full((40, 120, 3), 90, np.uint8)
    wide[:, :20] = wide[:, -20:] = (250, 0, 0)
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    assert isinstance(base, MultimodalBase)
    same = {key: value for key, value in base.picture_settings.items() if key != "do_convert_rgb"}
    for fit, pads in (("crop", False), ("pad", True)):
        found = PictureStore(base, fit).inputs([wide])["pixel_values"]
        theirs = transformers.LlavaImageProcessor(**same, do_pad=pads)(
            images=[Image.fromarray(wide)], return_tensors="pt"
        )
        torch.testing.assert_close(found, theirs["pixel_values"], rtol=0, atol=0.02)  # the mean is a whole number
        red = (found[0, 0] > 0.5) & (found[0, 1] < -0.5)
        assert bool(red.any()) == pads
    assert bool((found[0, :, 0].abs() < 0.02).all())  # above the picture


SHAPE = ResamplerSettings(queries=3, blocks=2, width=128)


@pytest.mark.parametrize("tower", [pytest.param("clip", marks=SLOW), pytest.param("siglip", marks=SLOW), "timm"])
@torch.no_grad()
def test_a_resampler_says_so_many_tokens_of_a_picture_and_comes_back_from_its_folder(
    tower: str, parts: Path, tmp_path: Path, photos: Callable[[str], Path]
):
    base = assemble(str(parts / tower), str(parts / "llama"), SHAPE)
    save_base(base, tmp_path / "llava")
    assert domain_of_base(str(tmp_path / "llava")) == "llm_mm"
    again = graft.load_base(str(tmp_path / "llava"), "cpu")
    assert isinstance(again, MultimodalBase) and again.is_llava and again.hash == base.hash
    torch.testing.assert_close(sample_logits(again), sample_logits(base), rtol=1e-4, atol=1e-5)
    reader = Reader.of(again, DataConfig(path="-"))
    batch, _ = reader.batch(rows(photos))
    assert int((batch.ids == reader.writer.image_id).sum()) == 3 * 3
    # the formula, with torch's own attention
    net, x = again.model.model.multi_modal_projector, torch.randn(2, 16, 32)
    inside, q = net.into(x), net.queries.expand(2, -1, -1)
    for block in net.blocks:
        own = block.norm_q(q)
        seen = torch.cat([block.norm_x(inside), own], 1)
        theirs, three = (
            torch.nn.MultiheadAttention(128, 2, batch_first=True),
            (block.q_proj, block.k_proj, block.v_proj),
        )
        theirs.in_proj_weight.copy_(torch.cat([each.weight for each in three]))
        theirs.in_proj_bias.copy_(torch.cat([each.bias for each in three]))
        theirs.out_proj.load_state_dict(block.o_proj.state_dict())
        q = q + theirs(own, seen, seen)[0]
        q = q + block.down(torch.nn.functional.gelu(block.up(block.norm(q))))
    torch.testing.assert_close(net(x), net.out(net.norm(q)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_transformers_alone_does_not_take_a_resampler_for_llavas_projector(parts: Path, tmp_path: Path):
    """In another process, which has not been told of the model, its folder is refused by its type."""
    base = assemble(str(parts / "timm"), str(parts / "llama"), SHAPE)
    save_base(base, tmp_path / "llava")
    forced = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    store = PictureStore(base)
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 3, features"):
        forced(input_ids=torch.tensor([store.expand(WHITE)]), **store.inputs([WHITE]))
    code = "import sys, transformers as t; t.AutoModelForImageTextToText.from_pretrained(sys.argv[1])"
    told = subprocess.run([sys.executable, "-c", code, tmp_path / "llava"], capture_output=True, text=True, check=False)
    assert told.returncode and "graft_llava" in told.stderr and "does not recognize this architecture" in told.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen3", "Mistral", "SmolLM3"])
@torch.no_grad()
def test_the_language_model_of_parts_says_what_it_said(family: str, parts: Path, tmp_path: Path):
    """On words alone, with shared keys, and with the token table as its head or not."""
    words = models.load_llava_tokenizer()
    head = {"head_dim": 16, "pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id}
    config = getattr(transformers, f"{family}Config")(
        **SIZE, **head, eos_token_id=words.eos_token_id, num_key_value_heads=1, vocab_size=len(words),
        tie_word_embeddings=family != "Mistral",
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path / "words")
    words.save_pretrained(tmp_path / "words")
    base = assemble(str(parts / "clip"), str(tmp_path / "words"), SHAPE)
    save_base(base, tmp_path / "llava")
    ids = torch.tensor([words("what is this ? red apple").input_ids])
    for each in (base, graft.load_base(str(tmp_path / "llava"), "cpu")):
        torch.testing.assert_close(each.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_other_towers_and_projectors_are_refused(parts: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="projector = 'q-former': .*ResamplerSettings"):
        assemble(str(parts / "timm"), str(parts / "llama"), "q-former")  # type: ignore[arg-type]
    for layer in (-4, 0, 3):
        with pytest.raises(InputError, match=f"layer = {layer}: expected 1 to 2, or from -1 on"):
            assemble(str(parts / "clip"), str(parts / "llama"), layer=layer)
    tower: dict[str, Any] = {**json.loads((parts / "timm" / "config.json").read_text())}
    for more in ({"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}):
        folder = parts / f"timm-{len(more)}"
        folder.mkdir()
        settings = {**tower["model_args"], **more}
        (folder / "config.json").write_text(json.dumps({**tower, "model_args": settings}))
        model = timm.create_model(tower["architecture"], **settings)
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match="it is no plain ViT"):
            assemble(str(folder), str(parts / "llama"))
    (folder / "config.json").write_text(json.dumps({**tower, "architecture": "vit_none"}))
    with pytest.raises(InputError, match=r"the tower cannot be loaded \(Unknown model"):
        assemble(str(folder), str(parts / "llama"))
    with monkeypatch.context() as patch:
        asked = list[str]()
        patch.setattr(timm, "create_model", lambda name, **settings: asked.append(name))
        with pytest.raises(AttributeError):
            assemble("timm/vit", str(parts / "llama"))
        assert asked == ["hf-hub:timm/vit"]  # a hub's name, as timm wants it
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
@pytest.mark.parametrize("name", ["lora", "llava", "llava on a resampler"])
def test_peft_and_transformers_say_what_the_attached_adapter_says(
    name: str, tiny: Path, resampled: Path, tmp_path: Path
):
    from peft import PeftModel

    name, _, other = name.partition(" ")
    tiny = resampled if other else tiny
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


def test_a_merge_that_answers_differently_is_told(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    assert isinstance(base, MultimodalBase)
    adapter = trained(base, LanguageLoRA(rank=2), "lora")
    with adapter.attached(base) as handle:
        monkeypatch.setattr(handle, "merge", lambda: None)
        with pytest.raises(GraftError, match="the merged model's logits differ by .* of the largest one"):
            save_merged(base, handle, tmp_path / "merged")


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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["SmolVLM", "Qwen2_5_VL", "Qwen3VL"])
def test_verify_compares_with_peft_on_other_models(family: str, tmp_path: Path):
    torch.manual_seed(0)
    save_base(FAMILIES[family](), tmp_path / "base")
    base = graft.load_base(str(tmp_path / "base"), "cpu", domain="llm_mm")
    assert isinstance(base, MultimodalBase)
    told = compare(base, trained(base, LanguageLoRA(rank=2, towers=("language", "projector", "vision")), "lora"))
    assert isinstance(told, dict) and told["same"], told
    assert told["library"] == "peft" and told["error"] < 1e-3 and told["change"] > 1e-3


def test_what_peft_cannot_hold_is_refused(tiny: Path, tmp_path: Path):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    adapter = trained(base, LlavaTuning(language="full"), "llava")
    with pytest.raises(InputError, match="to peft this is no adapter"):
        adapter.export(tmp_path / "peft", "peft")
    assert "to peft this is no adapter" in str(compare(base, adapter))
