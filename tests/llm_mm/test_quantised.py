"""QLoRA and LoftQ by part of a multimodal model."""

from pathlib import Path

import pytest
import torch

import graft
from graft.llm_mm.method import LanguageDoRA, LanguageLoRA, LanguageLoRAFA, sample_logits
from graft.studio.adapter import Adapter
from graft.studio.errors import InputError
from graft.studio.methods.loftq import loftq
from graft.studio.pocket import models
from graft.studio.training import train

bitsandbytes = pytest.importorskip("bitsandbytes")


def four_bit(layer: torch.nn.Linear) -> torch.nn.Linear:
    made = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None)
    made.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    made.bias = layer.bias
    return made.to("cpu")


def rounded_layers(model: torch.nn.Module) -> set[str]:
    return {name for name, part in model.named_modules() if isinstance(part, bitsandbytes.nn.Linear4bit)}


@pytest.mark.slow
def test_a_folder_in_four_bits_is_a_base_for_qlora(questions: Path, tmp_path: Path):
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    full = models.export("pocket-llava", tmp_path / "full")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    rounded = AutoModelForImageTextToText.from_pretrained(full, quantization_config=nf4, dtype=torch.float32)
    rounded.save_pretrained(tmp_path / "nf4")
    models.llava_processor().save_pretrained(tmp_path / "nf4")

    data, steps = {"path": str(questions)}, {"steps": 4, "batch_size": 4, "learning_rate": 1e-2}
    made = {"domain": "llm_mm", "method": {"name": "lora", "rank": 2}, "data": data, "train": steps}
    run = train({"base": str(tmp_path / "nf4"), **made}, tmp_path / "run")
    assert run.status == "finished"
    base = graft.load_base(str(tmp_path / "nf4"), "cpu", domain="llm_mm")
    adapter = Adapter.load(run.folder / "result")
    layers = {name for name in rounded_layers(base.model) if "language_model" in name}
    assert layers and layers == {site["name"] for site in adapter.card.sites}
    plain = sample_logits(base)
    with adapter.attached(base):
        assert not torch.equal(sample_logits(base), plain)
    assert torch.equal(sample_logits(base), plain)


def test_loftq_starts_nearer_to_the_model_in_the_parts_that_are_named(tiny: Path):
    method = LanguageLoRA(rank=4, alpha=4, towers=("language",))
    whole = sample_logits(graft.load_base(str(tiny), "cpu", domain="llm_mm"))
    far = []
    for steps in (0, 1):
        base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
        if steps:
            loftq(base.model, method, four_bit, steps)
        else:
            for site in method.plan(base.model):
                parent, _, child = site.name.rpartition(".")
                setattr(base.model.get_submodule(parent), child, four_bit(base.model.get_submodule(site.name)))
        assert {name.split(".")[1] for name in rounded_layers(base.model)} == {"language_model"}
        far.append(float((sample_logits(base) - whole).norm()))
    assert 0 < far[1] < far[0]


@pytest.mark.parametrize("method", [LanguageDoRA, LanguageLoRAFA])
def test_loftq_wants_a_plain_lora(method: type, tiny: Path):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    with pytest.raises(InputError, match="plain LoRA"):
        loftq(base.model, method(), four_bit)
