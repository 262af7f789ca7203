"""`graft adapters verify` compares both towers with those that peft makes of the file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.studio.adapter import Adapter, Card, base_hash, load_adapter
from graft.studio.config import to_dict
from graft.vlm.base import ClipBase
from graft.vlm.clip_lora import ClipLoRA
from graft.vlm.verification import compare


def adapter(base: ClipBase) -> Adapter:
    """As a training leaves it, with random values."""
    method = ClipLoRA()
    handle = method.attach(base.modules)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    handle.detach()
    told = {"classes": ["cat", "dog"], "templates": ["a photo of a {}."], "strength": 1.0}
    card = Card("clip_lora", to_dict(method), "vlm", base.name, base.hash, handle.plan.to_list(), details=told)
    return Adapter(handle.tensors(), card)


@pytest.mark.parametrize("kind", ["transformers CLIP", "transformers SigLIP", "open_clip CLIP"])
def test_a_lora_is_the_same_in_peft_and_one_of_another_strength_is_not(
    kind: str, of: Callable[[str], ClipBase], tmp_path: Path
):
    base = of(kind)
    own, before = adapter(base), base_hash(base.modules)
    told = compare(base, own)
    assert isinstance(told, dict) and told["same"], told
    assert told["library"] == "peft" and told["error"] < 1e-3 and told["change"] > 0.01
    own.export(tmp_path, "peft")
    told = compare(base, load_adapter(tmp_path), tmp_path)  # the file itself, read here and there
    assert isinstance(told, dict) and told["same"], told
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: 2 * t if "lora_B" in k else t for k, t in load_file(file).items()}, file)
    told = compare(base, own, tmp_path)
    assert isinstance(told, dict) and not told["same"] and 0.1 < told["error"] < 10
    assert base_hash(base.modules) == before


def test_a_head_is_written_for_no_other_library(base: ClipBase):
    own = adapter(base)
    head = replace(own, card=replace(own.card, method="tip_adapter"))
    assert "tip_adapter is not written in it" in str(compare(base, head))
