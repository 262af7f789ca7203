"""Prompt and prefix tuning against peft, with padding, caches and generation."""

from typing import Any

import peft
import pytest
import timm
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from graft.studio.errors import SiteError
from graft.studio.methods.prefix_tuning import PrefixTuning
from graft.studio.methods.prompt_tuning import PromptTuning


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64,
                                      pad_token_id=0)).requires_grad_(False).eval()  # fmt: skip


IDS = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(1))


def padded():
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    return {"input_ids": IDS, "attention_mask": mask}


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("method", [PromptTuning(length=4), PrefixTuning(length=4, hidden=None)])
def test_peft_gives_the_same_logits_gradients_and_text(make, method):
    ours, prompts = make(), isinstance(method, PromptTuning)
    kind = peft.PromptTuningConfig if prompts else peft.PrefixTuningConfig
    theirs: Any = peft.get_peft_model(make(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    weight = theirs.prompt_encoder["default"].embedding.weight
    handle = method.attach(ours)
    (name,) = handle.tensors()
    handle.load({name: weight.detach()})
    found, expected = ours(**padded()).logits, theirs(**padded()).logits
    found, expected = (each[padded()["attention_mask"].bool()] for each in (found, expected[:, 4 if prompts else 0 :]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().mean().backward()
    expected.square().mean().backward()
    (parameter,) = handle.bank.parameters()
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad[0], weight.grad, rtol=1e-4, atol=1e-6)
    settings = {"max_new_tokens": 5, "do_sample": False}
    text = ours.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **settings)
    assert torch.equal(text, theirs.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **settings))


@pytest.mark.parametrize("method", [PromptTuning(length=4), PrefixTuning(length=4, hidden=None)])
def test_generation_with_a_cache_is_that_without(method):
    model = llama()
    handle = method.attach(model)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter)
    settings = {"max_new_tokens": 6, "do_sample": False, **padded()}
    assert torch.equal(model.generate(use_cache=True, **settings), model.generate(use_cache=False, **settings))
    out = model(IDS, use_cache=False)
    assert out.past_key_values is None
    assert out.logits.shape == (3, 7, 50)
    embeds = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, out.logits)


def test_hidden_states_are_those_of_the_model_below():
    model = llama()
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 3
    PrefixTuning(length=4).attach(model)
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 3


def test_rows_have_prompts_of_their_own_and_generate_with_them():
    model = llama()
    handle = PromptTuning(length=4).attach(model, slots=2)
    handle.route(torch.tensor([1, 0, 1]))
    text = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    for row, slot in enumerate((1, 0, 1)):
        handle.route(torch.tensor([slot]))
        alone = model.generate(input_ids=IDS[row : row + 1], max_new_tokens=4, do_sample=False)
        assert torch.equal(text[row : row + 1], alone)


def test_prompts_start_as_tokens_and_on_a_vit_uniform():
    model = llama()
    start = PromptTuning(length=4).attach(model).tensors()["model.P"]
    table = model.get_input_embeddings().weight
    assert all(any(torch.equal(row, token) for token in table) for row in start)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=2, num_classes=3)
    vit.requires_grad_(False).eval()
    x = torch.randn(2, 3, 32, 32)
    handle = PromptTuning(length=5).attach(vit)
    prompts = handle.tensors()["blocks.P"]
    assert 0.4 < prompts.abs().max() <= 0.5
    found = vit(x)
    handle.detach()
    tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
    tokens = vit.blocks(torch.cat([tokens, prompts.expand(2, -1, -1)], 1))  # attention does not see the order
    torch.testing.assert_close(found, vit.forward_head(vit.norm(tokens[:, :-5])))


def test_the_prefix_is_made_by_the_network_of_the_paper():
    model = llama()
    handle = PrefixTuning(length=3, hidden=6).attach(model)
    t = {name.rpartition(".")[2]: tensor for name, tensor in handle.tensors().items()}
    flat = torch.tanh(t["E"] @ t["V"].T + t["v"]) @ t["W"].T + t["w"]
    expected = model(**padded()).logits
    handle.detach()
    direct = PrefixTuning(length=3, hidden=None).attach(model)
    direct.load({"model.E": flat})
    torch.testing.assert_close(model(**padded()).logits, expected)


def test_what_would_go_wrong_silently_is_refused():
    model = llama()
    handle = PrefixTuning(length=3).attach(model)
    model.gradient_checkpointing_enable()
    with pytest.raises(SiteError, match="gradient checkpointing drops the cache"):
        model.train()(IDS)
    handle.detach()
    PromptTuning(length=3).attach(model)
    with pytest.raises(SiteError, match="none of tokens"):
        model(IDS, attention_mask=torch.zeros(3, 1, 7, 7))
    with pytest.raises(SiteError, match="no sequence of the model"):
        PromptTuning().attach(nn.Sequential(nn.Linear(2, 2)))
