"""What is written for peft and transformers says there what it says here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.llava import LlavaTuning
from graft.llm_mm.method import (
    LanguageIA3,
    LanguageLoRA,
    LanguagePrefix,
    LanguagePrompt,
    sample_logits,
    save_base,
    save_merged,
)
from graft.llm_mm.verification import compare
from graft.studio.adapter import Adapter, Card, base_hash
from graft.studio.config import to_dict
from graft.studio.errors import GraftError, InputError

SLOW = pytest.mark.slow


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
def test_verify_compares_with_peft_on_other_models(
    family: str, tmp_path: Path, of_family: Callable[[str], MultimodalBase]
):
    torch.manual_seed(0)
    save_base(of_family(family), tmp_path / "base")
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
