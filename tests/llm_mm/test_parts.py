"""LLaVAs from a tower, a projector or resampler, and a language model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration

import graft
from graft.llm_mm.assembly import assemble
from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import Conversation
from graft.llm_mm.data import DataConfig
from graft.llm_mm.llava import LlavaTuning
from graft.llm_mm.method import (
    sample_logits,
    save_base,
)
from graft.llm_mm.pictures import PictureStore
from graft.llm_mm.resampler import ResamplerSettings
from graft.llm_mm.task import Reader
from graft.studio.errors import InputError
from graft.studio.pocket import models
from graft.studio.registry import domain_of_base

SLOW = pytest.mark.slow
WHITE = np.full((40, 40, 3), 255, np.uint8)
SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


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
    tower: str, projector: Any, parts: Path, tmp_path: Path, conversations: list[Conversation]
):
    base = assemble(str(parts / tower), str(parts / "llama"), projector)
    save_base(base, tmp_path / "llava")
    again = graft.load_base(str(tmp_path / "llava"), "cpu")
    assert isinstance(again, MultimodalBase) and again.is_llava
    torch.testing.assert_close(sample_logits(again), sample_logits(base), rtol=1e-4, atol=1e-5)
    reader = Reader.of(again, DataConfig(path="-"))
    batch, _ = reader.batch(conversations)
    assert int((batch.ids == reader.writer.image_id).sum()) == 3 * 16
    handle = LlavaTuning(stage=1).attach(again.model)
    handle.probe(lambda: torch.nn.functional.cross_entropy(*reader.logits(batch, frozen_tower=True)))
    whole, _ = reader.logits(batch, frozen_tower=False)
    torch.testing.assert_close(reader.logits(batch, frozen_tower=True)[0], whole, rtol=1e-3, atol=1e-4)


SHAPE = ResamplerSettings(queries=3, blocks=2, width=128)


@pytest.mark.parametrize("tower", [pytest.param("clip", marks=SLOW), pytest.param("siglip", marks=SLOW), "timm"])
@torch.no_grad()
def test_a_resampler_says_so_many_tokens_of_a_picture_and_comes_back_from_its_folder(
    tower: str, parts: Path, tmp_path: Path, conversations: list[Conversation]
):
    base = assemble(str(parts / tower), str(parts / "llama"), SHAPE)
    save_base(base, tmp_path / "llava")
    assert domain_of_base(str(tmp_path / "llava")) == "llm_mm"
    again = graft.load_base(str(tmp_path / "llava"), "cpu")
    assert isinstance(again, MultimodalBase) and again.is_llava and again.hash == base.hash
    torch.testing.assert_close(sample_logits(again), sample_logits(base), rtol=1e-4, atol=1e-5)
    reader = Reader.of(again, DataConfig(path="-"))
    batch, _ = reader.batch(conversations)
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
