"""Prompt and prefix tuning against peft, with padding, caches and generation."""

from typing import Any

import open_clip
import peft
import pytest
import timm
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

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


@torch.no_grad()
def test_two_prompts_on_one_decoder_stand_one_behind_the_other():
    model = llama()
    handles = [PromptTuning(length=length).attach(model) for length in (2, 3)]
    found, both = model(**padded()).logits, torch.cat([handle.tensors()["model.P"] for handle in handles])
    for handle in handles:
        handle.detach()
    PromptTuning(length=5).attach(model).load({"model.P": both})
    torch.testing.assert_close(found, model(**padded()).logits)


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


CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def text_encoder():
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(vocab_size=50, **CLIP)).requires_grad_(False).eval()


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).requires_grad_(False).eval()  # fmt: skip


def open_clip_model():
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 64, "patch_size": 16, "image_size": 32}
    text = {"layers": 2, "width": 64, "heads": 2, "vocab_size": 50, "context_length": 7}
    return open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).requires_grad_(False).eval()


def attended(qkv, heads, before, mask=0.0):
    """One softmax over the prefix (rows, 2 width) and the keys (b, n, width)."""
    (q, k, v), length = qkv, len(before)
    pk, pv = (part.expand(len(k), -1, -1) for part in before.chunk(2, -1))
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, torch.cat([pk, k], 1), torch.cat([pv, v], 1)))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return ((scores + nn.functional.pad(scores.new_zeros(scores[..., length:].shape) + mask, (length, 0))).softmax(-1)
            @ v).transpose(1, 2).flatten(2)  # fmt: skip


def causal(length):
    return torch.full((length, length), float("-inf")).triu(1)


@torch.no_grad()
def test_an_attention_of_each_library_has_the_prefix_among_its_keys():
    x, text = torch.randn(3, 7, 16), torch.randn(3, 5, 12)
    method = PrefixTuning(length=4, hidden=None)
    vit: Any = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=16, num_heads=2)
    handle = method.attach(vit)
    attention = vit.blocks[0].attn
    before = handle.tensors()["blocks.0.attn.E"]
    expected = attention.proj(attended(attention.qkv(x).chunk(3, -1), 2, before))
    torch.testing.assert_close(attention(x), expected)

    clip: Any = text_encoder()
    handle = method.attach(clip)
    layer = clip.encoder.layers[1].self_attn
    before = handle.tensors()["encoder.layers.1.self_attn.E"]
    parts = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    expected = layer.out_proj(attended(parts, 2, before, causal(7)))
    torch.testing.assert_close(layer(x, is_causal=True)[0], expected)  # a flag, which would be wrong now
    shown = causal(7)[None, None].expand(3, 1, 7, 7) == 0
    torch.testing.assert_close(layer(x, attention_mask=shown)[0], expected)

    denoiser: Any = unet()
    handle = method.attach(denoiser)
    (name,) = (site.name for site in handle.plan if site.name.startswith("mid") and site.name.endswith("attn2"))
    cross, before = denoiser.get_submodule(name), handle.tensors()[f"{name}.E"]
    parts = cross.to_q(x), cross.to_k(text), cross.to_v(text)
    expected = cross.to_out[0](attended(parts, cross.heads, before))
    torch.testing.assert_close(cross(x, encoder_hidden_states=text), expected)

    both: Any = open_clip_model()
    handle = method.attach(both)
    assert {site.tower for site in handle.plan} == {"text", "vision"}
    attention, x = both.transformer.resblocks[0].attn, torch.randn(3, 7, 64)
    before = handle.tensors()["transformer.resblocks.0.attn.E"]
    packed = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    expected = attention.out_proj(attended(packed, 2, before, causal(7)))
    torch.testing.assert_close(attention(x, x, x, need_weights=False, attn_mask=causal(7))[0], expected)


def test_attentions_share_the_rows_and_the_network_but_its_last_layer():
    model = text_encoder()
    handle = PrefixTuning(length=3, hidden=6).attach(model)
    t, first = handle.tensors(), "encoder.layers.0.self_attn"
    assert {name.rpartition(".")[2] for name in t} == {"E", "V", "v", "W", "w"}
    assert [name for name in t if name.endswith(("E", "V", "v"))] == [f"{first}.{name}" for name in ("E", "V", "v")]
    assert handle.plan.parameters == sum(tensor.numel() for tensor in t.values())
    inside, expected = torch.tanh(t[f"{first}.E"] @ t[f"{first}.V"].T + t[f"{first}.v"]), model(IDS).last_hidden_state
    layers = [f"encoder.layers.{k}.self_attn" for k in range(2)]
    flat = {f"{layer}.E": inside @ t[f"{layer}.W"].T + t[f"{layer}.w"] for layer in layers}
    handle.detach()
    PrefixTuning(length=3, hidden=None).attach(model).load(flat)
    torch.testing.assert_close(model(IDS).last_hidden_state, expected)


@torch.no_grad()
@pytest.mark.parametrize("pad", [False, True])
def test_encoders_read_prompts_as_if_they_were_tokens(pad):
    model: Any = text_encoder()
    prompts = PromptTuning(length=3).attach(model).tensors()["encoder.P"]
    mask = torch.ones_like(IDS)
    if pad:
        mask[1, 5:] = 0
    x = torch.cat([prompts.expand(3, -1, -1), model.embeddings(IDS)], 1)
    shown = causal(10) + torch.where(nn.functional.pad(mask, (3, 0), value=1).bool(), 0.0, float("-inf"))[:, None, None]
    for layer in model.encoder.layers:
        x = layer(x, attention_mask=shown)
    expected = model.final_layer_norm(x[:, 3:])
    torch.testing.assert_close(model(IDS, attention_mask=mask if pad else None).last_hidden_state, expected)

    seer: Any = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, **CLIP)).eval()
    prompts = PromptTuning(length=3).attach(seer).tensors()["encoder.P"]
    pictures = torch.randn(3, 3, 32, 32)
    x = torch.cat([prompts.expand(3, -1, -1), seer.pre_layrnorm(seer.embeddings(pictures))], 1)
    for layer in seer.encoder.layers:
        x = layer(x, attention_mask=None)
    torch.testing.assert_close(seer(pictures).last_hidden_state, x[:, 3:])


@torch.no_grad()
def test_open_clip_and_a_denoiser_read_prompts_too():
    both: Any = open_clip_model()
    handle = PromptTuning(length=3).attach(both)
    assert {site.name for site in handle.plan} == {"visual.transformer", "transformer"}
    x = both.token_embedding(IDS) + both.positional_embedding
    longer = torch.cat([handle.tensors()["transformer.P"].expand(3, -1, -1), x], 1)
    for block in both.transformer.resblocks:
        longer = block(longer, attn_mask=causal(10))
    expected = both.ln_final(longer[:, 3:])[torch.arange(3), IDS.argmax(-1)] @ both.text_projection
    torch.testing.assert_close(both.encode_text(IDS), expected)

    denoiser, x, text = unet(), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    handle = PromptTuning(length=3).attach({"unet": denoiser})
    found, shown = denoiser(x, 3, text).sample, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    masked = denoiser(x, 3, text, encoder_attention_mask=shown).sample
    handle.detach()
    longer = torch.cat([handle.tensors()["unet.P"].expand(2, -1, -1), text], 1)
    torch.testing.assert_close(found, denoiser(x, 3, longer).sample)
    shown = nn.functional.pad(shown, (3, 0), value=1)
    torch.testing.assert_close(masked, denoiser(x, 3, longer, encoder_attention_mask=shown).sample)


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
    model = text_encoder()
    model.set_attn_implementation("eager")
    PrefixTuning(length=3).attach(model)
    with pytest.raises(SiteError, match=r"layers\.0\.self_attn: it calls torch's .* 0 times"):
        model(IDS)
    model = text_encoder()
    PromptTuning(length=3).attach(model)
    with pytest.raises(SiteError, match="cannot be lengthened"):
        model.encoder(inputs_embeds=torch.zeros(3, 7, 16), attention_mask=torch.zeros(3, 1, 1, 7), is_causal=True)
