"""Methods on small models of the true classes of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import Conversation
from graft.llm_mm.data import DataConfig
from graft.llm_mm.llama_adapter import LlamaAdapter
from graft.llm_mm.llama_adapter_multimodal import MultimodalLlamaAdapter
from graft.llm_mm.llama_adapter_v2 import LlamaAdapterV2
from graft.llm_mm.llava import LlavaTuning
from graft.llm_mm.method import (
    LanguageLoRA,
    LanguagePrompt,
    model_inputs,
    sample_logits,
    save_base,
)
from graft.llm_mm.parts import part_of
from graft.llm_mm.task import Reader
from graft.studio.errors import SiteError
from graft.studio.registry import domain_of_base
from graft.studio.runs import Run
from graft.studio.training import train

SLOW = pytest.mark.slow
FAMILIES = ("LlavaNext", "SmolVLM", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL")


@pytest.mark.parametrize(
    "family", [each if each == "LlavaNext" else pytest.param(each, marks=SLOW) for each in FAMILIES]
)
def test_lora_learns_on_models_of_the_true_classes(
    family: str, of_family: Callable[[str], MultimodalBase], conversations: list[Conversation]
):
    torch.manual_seed(0)
    base = of_family(family)
    reader = Reader.of(base, DataConfig(path="-"))
    batch, tokens = reader.batch(conversations)
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
    words, _ = reader.batch([conversations[2]] * 2)  # a batch without a picture
    assert torch.isfinite(reader.logits(words, frozen_tower=True)[0]).all()
    # the same tokens as the processor's own
    row = conversations[0]
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
def test_llama_adapter_acts_inside_models_that_read_pictures(
    family: str, method: Any, of_family: Callable[[str], MultimodalBase], conversations: list[Conversation]
):
    """On the language model alone: the same bits at the start, and then a generation with its cache as without."""
    torch.manual_seed(0)
    base = of_family(family)
    for weight in base.model.parameters():
        weight.mul_(4 if weight.dim() > 1 else 1)
    reader = Reader.of(base, DataConfig(path="-"))
    batch, _ = reader.batch(conversations)
    plain, _ = reader.logits(batch, False)
    handle = method.attach(base.model)
    assert {part_of(site.name) for site in handle.plan} == {"language"}
    assert torch.equal(reader.logits(batch, False)[0], plain)
    for name, parameter in handle.bank.named_parameters():
        parameter.add_(torch.randn_like(parameter), alpha=1.0 if name.endswith(".g") else 0.1)
    assert (reader.logits(batch, False)[0] - plain).abs().max() > 1e-2
    settings = {"do_sample": False, "max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    for row in (conversations[0], conversations[2]):
        ids = torch.tensor([reader.writer.prompt(row.asking(), reader.store.expand)])
        inputs = model_inputs(base, ids, torch.ones_like(ids), reader.store.inputs(row.pictures))
        told = [base.model.generate(**inputs, **settings, use_cache=cache) for cache in (True, False)]
        assert torch.equal(told[0].sequences, told[1].sequences)
        torch.testing.assert_close(*(torch.stack(each.logits) for each in told), rtol=1e-4, atol=1e-4)
    handle.detach()
    assert torch.equal(reader.logits(batch, False)[0], plain)


@pytest.mark.parametrize(
    "family", [each if each == "Qwen3VL" else pytest.param(each, marks=SLOW) for each in FAMILIES[2:]]
)
@torch.no_grad()
def test_prompts_stand_before_rows_whose_positions_turn(
    family: str, of_family: Callable[[str], MultimodalBase], conversations: list[Conversation]
):
    """Against the decoder itself, called with the longer rows; positions of pictures' rows and columns move along."""
    torch.manual_seed(0)
    base, given = of_family(family), list[dict[str, Any]]()
    for weight in base.model.parameters():
        weight.mul_(4 if weight.dim() > 1 else 1)
    reader = Reader.of(base, DataConfig(path="-"))
    (batch, _), decoder = reader.batch(conversations), base.model.model.language_model
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
    for row in (conversations[0], conversations[2]):
        ids = torch.tensor([reader.writer.prompt(row.asking(), reader.store.expand)])
        inputs = model_inputs(base, ids, torch.ones_like(ids), reader.store.inputs(row.pictures))
        told = [base.model.generate(**inputs, **settings, use_cache=cache).logits for cache in (True, False)]
        torch.testing.assert_close(*map(torch.stack, told), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["LlavaNext", "Qwen2_5_VL", pytest.param("Qwen3VL", marks=SLOW)])
@torch.no_grad()
def test_a_projector_drawn_anew_has_its_norms_at_one(family: str, of_family: Callable[[str], MultimodalBase]):
    base = of_family(family)
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


def test_pictures_in_tiles_are_no_prompt(of_family: Callable[[str], MultimodalBase]):
    """Refused when it is attached, not at the first step."""
    with pytest.raises(SiteError, match="shows a picture as several tiles.*use llama_adapter or lora"):
        MultimodalLlamaAdapter(num_tokens=2).attach(of_family("LlavaNext").model)
    with pytest.raises(SiteError, match="reads no pictures, or in a form that is not known.*as Llava"):
        MultimodalLlamaAdapter(num_tokens=2).plan(of_family("SmolVLM").model)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_each_family_is_trained_and_merged_by_a_job(
    family: str, tmp_path: Path, questions: Path, of_family: Callable[[str], MultimodalBase]
):
    """From the folder that transformers saved to the one that it loads: rows with pictures and without, packed too."""
    torch.manual_seed(0)
    save_base(of_family(family), tmp_path / "base")
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
    family: str,
    tmp_path: Path,
    questions: Path,
    resumed: Callable[[Run], dict[str, Any]],
    of_family: Callable[[str], MultimodalBase],
):
    """A projector drawn anew, and LoRA of language and tower from there; the projector is whole in both files."""
    torch.manual_seed(0)
    save_base(of_family(family), tmp_path / "base")
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
