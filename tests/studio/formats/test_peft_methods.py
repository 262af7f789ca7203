"""What peft has beside LoRA on plain layers, each the same in peft itself, both ways."""

import json

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import FormatError, InputError
from graft.studio.methods.adalora import AdaLoRA
from graft.studio.methods.dora import DoRA
from graft.studio.methods.ia3 import IA3
from graft.studio.methods.lora import LoRA
from graft.studio.methods.prefix_tuning import PrefixTuning
from graft.studio.methods.prompt_tuning import PromptTuning

PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(0))
FILE = "adapter_model.safetensors"


def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=2, num_classes=3)
    return model.requires_grad_(False).eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).eval()


class Attention(nn.Module):
    """torch's MultiheadAttention and a linear layer."""

    def __init__(self):
        super().__init__()
        self.attn, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.attn(x, x, x, need_weights=False)[0])


def attention():
    torch.manual_seed(0)
    return Attention().requires_grad_(False).eval()


def trained(name, model, method, run):
    """An adapter with random tensors, and what the model gives with it."""
    handle = method.attach(model)
    handle.bank.eval()
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    expected = run(model)
    handle.detach()
    return Adapter(handle.tensors(), Card(name, to_dict(method), sites=handle.plan.to_list())), expected


def same(folder, model, run, expected):
    """Whether we give the expected output with what a folder holds."""
    with load_adapter(folder).attached(model):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


# AdaLoRA


@pytest.mark.parametrize("targets", ["attention", ("q", "v", "up"), "mlp"])  # q, k, v packed: three times the rank
def test_adalora_is_the_same_in_peft_both_ways(tmp_path, targets):
    def run(model):
        return model(PICTURES)

    adapter, expected = trained("adalora", vit(), AdaLoRA(rank=3, target_rank=2, alpha=7, targets=targets), run)
    assert not torch.allclose(run(vit()), expected, atol=1e-2)
    adapter.export(tmp_path, "peft")
    theirs = peft.PeftModel.from_pretrained(vit(), tmp_path)
    torch.testing.assert_close(theirs(PICTURES), expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path, tmp_path / "theirs"):
        same(folder, vit(), run, expected)


def test_adalora_that_peft_has_pruned_keeps_its_scale_and_its_ranks(tmp_path):
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=9, target_modules=["fc1", "attn.proj"], total_step=10)
    theirs = peft.get_peft_model(vit(), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    masks = {f"blocks.{k}.mlp.fc1.lora_E": [True, False, k == 0, True] for k in range(2)}
    with torch.no_grad():
        for name, mask in masks.items():
            theirs.get_parameter(f"base_model.model.{name}.default")[~torch.tensor(mask)] = 0.0
    expected = theirs(PICTURES)
    config.rank_pattern = masks
    theirs.save_pretrained(tmp_path)
    assert load_file(tmp_path / FILE)["base_model.model.blocks.1.mlp.fc1.lora_A"].shape[0] == 2
    same(tmp_path, vit(), lambda model: model(PICTURES), expected)


def test_adalora_as_a_lora_for_others_still_says_the_same(tmp_path):
    adapter, _ = trained("adalora", vit(), AdaLoRA(rank=3, target_rank=2, targets="mlp"), lambda model: model(PICTURES))
    adapter.export(tmp_path, "peft")
    plain = AdaLoRA.as_lora(load_adapter(tmp_path)).tensors
    for name, tensor in AdaLoRA.as_lora(adapter).tensors.items():
        if name.endswith(".B"):
            ours = tensor @ adapter.tensors[f"{name[:-1]}A"] * (8 / 3)
            torch.testing.assert_close(plain[name] @ plain[f"{name[:-1]}A"], ours)


def test_adalora_with_a_missing_or_unknown_key_is_refused(tmp_path):
    adapter, _ = trained("adalora", vit(), AdaLoRA(rank=3, target_rank=2, targets="mlp"), lambda model: model(PICTURES))
    adapter.export(tmp_path, "peft")
    tensors = load_file(tmp_path / FILE)
    save_file({**tensors, "base_model.model.blocks.0.mlp.fc1.lora_F": torch.zeros(2)}, tmp_path / FILE)
    with pytest.raises(FormatError, match="fc1.lora_F: .*no factor of AdaLoRA"):
        load_adapter(tmp_path)
    del tensors["base_model.model.blocks.0.mlp.fc1.lora_E"]
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(FormatError, match="fc1.lora_E: missing"):
        load_adapter(tmp_path)


# Prompts and prefixes


def logits(model):
    return model(IDS).logits[:, -IDS.shape[1] :]  # peft keeps the prompt's own


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("prompt_tuning", PromptTuning(length=3)),
        ("prefix_tuning", PrefixTuning(length=3, hidden=None)),
        ("prefix_tuning", PrefixTuning(length=3, hidden=5)),
    ],
)
def test_prompts_are_the_same_in_peft_both_ways(tmp_path, name, method):
    adapter, expected = trained(name, llama(), method, logits)
    assert not torch.allclose(logits(llama()), expected, atol=1e-3)
    adapter.export(tmp_path, "peft")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path, tmp_path / "theirs"):
        same(folder, llama(), logits, expected)


@pytest.mark.parametrize("projection", [False, True])
def test_prefixes_that_peft_trains_are_read(tmp_path, projection):
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=projection, encoder_hidden_size=7
    )
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(tmp_path)
    same(tmp_path, llama(), logits, logits(theirs))


def test_prompts_that_no_decoder_reads_are_refused(tmp_path):
    adapter, _ = trained("prompt_tuning", vit(), PromptTuning(length=3), lambda model: model(PICTURES))
    with pytest.raises(InputError, match=r"blocks: peft has prompt_tuning for one decoder"):
        adapter.export(tmp_path, "peft")
    adapter, _ = trained("prompt_tuning", llama(), PromptTuning(length=3), logits)
    adapter.export(tmp_path, "peft")
    save_file({"prompt_embeddings": torch.zeros(3, 32), "more": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(FormatError, match="more: expected prompt_embeddings"):
        load_adapter(tmp_path)


# torch's MultiheadAttention


def test_an_attention_that_peft_trained_is_read_with_a_flag_and_a_warning(tmp_path):
    """peft adds the change of ``out_proj`` twice; the adapter that we read does what peft does."""
    x = torch.randn(2, 5, 16)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attn", "out"], init_lora_weights=False)
    theirs = peft.get_peft_model(attention(), config).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"changes twice.* taken 2 times"):
        adapter = load_adapter(tmp_path)
    assert adapter.card.details == {"peft_out_proj": 2}
    assert [site["name"] for site in adapter.card.sites] == ["attn"] * 3 + ["out", "attn.out_proj"]
    model = attention()
    with adapter.attached(model):
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "peft_version": "0.99.0"}))
    with pytest.warns(UserWarning, match="peft 0.99.0 wrote it, so its change is taken 1 times"):
        once = load_adapter(tmp_path)
    assert torch.equal(2 * once.tensors["attn.out_proj.B"], adapter.tensors["attn.out_proj.B"])


def test_an_attention_is_the_same_in_peft_without_its_output_projection(tmp_path):
    x = torch.randn(2, 5, 16)
    adapter, expected = trained("lora", attention(), LoRA(rank=2, targets=("q", "v")), lambda model: model(x))
    adapter.export(tmp_path, "peft")
    theirs = peft.PeftModel.from_pretrained(attention(), tmp_path).eval()
    torch.testing.assert_close(theirs(x), expected, rtol=1e-4, atol=1e-5)
    same(tmp_path, attention(), lambda model: model(x), expected)  # nothing is twice here: no warning
    whole, _ = trained("lora", attention(), LoRA(rank=2), lambda model: model(x))
    with pytest.raises(InputError, match="attn.out_proj: peft adds its change twice"):
        whole.export(tmp_path / "whole", "peft")
    for name, method in {
        "dora": DoRA(rank=2, targets=("q", "k", "v")),
        "adalora": AdaLoRA(targets="q"),
        "ia3": IA3(inputs=()),
    }.items():
        other, _ = trained(name, attention(), method, lambda model: model(x))
        with pytest.raises(InputError, match="attn: peft has"):
            other.export(tmp_path / "whole", "peft")


def test_an_attention_of_which_only_the_output_projection_is_adapted_is_recognised(tmp_path):
    """peft never calls it, and applies its factors twice where they stand beside those of the packed projection."""
    x = torch.randn(2, 5, 16)
    for method in (LoRA(rank=2, targets="o"), LoRA(rank=2, targets="attn.out_proj"), DoRA(rank=2, targets="o")):
        name = "dora" if isinstance(method, DoRA) else "lora"
        adapter, _ = trained(name, attention(), method, lambda model: model(x))
        with pytest.raises(InputError, match="attn.out_proj: peft adds its change twice"):
            adapter.export(tmp_path, "peft")
    assert list(tmp_path.iterdir()) == []
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attn"], init_lora_weights=False)
    peft.get_peft_model(attention(), config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    save_file({key: tensor for key, tensor in tensors.items() if ".base_layer.out_proj." in key}, tmp_path / FILE)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "init_lora_weights": True}))
    theirs = peft.PeftModel.from_pretrained(attention(), tmp_path).eval()  # the packed factors change nothing
    assert not torch.allclose(theirs(x), attention()(x), atol=1e-2)
    with pytest.warns(UserWarning, match="taken 2 times"):
        adapter = load_adapter(tmp_path)
    assert [(site["name"], site["kind"]) for site in adapter.card.sites] == [("attn.out_proj", "mha")]
    with adapter.attached(model := attention()):
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="attn.out_proj: peft adds its change twice"):
        adapter.export(tmp_path / "again", "peft")
