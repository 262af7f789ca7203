"""LLaMA-Adapter with pictures and its second version, against their formulas."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers import LlamaForCausalLM as Llama

from graft.llm_mm.llama_adapter_multimodal import MultimodalLlamaAdapter
from graft.llm_mm.llama_adapter_v2 import LlamaAdapterV2
from graft.studio.errors import InputError, SiteError

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
TEXT = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
PICTURES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WORDS = torch.randint(3, 30, (2, 5), generator=torch.Generator().manual_seed(1))
EARLY = LlamaAdapterV2(num_tokens=3, visual_tokens=2, visual_blocks=1)
LATE = replace(EARLY, fusion="late")


def llava() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **VISION)
    text = LlamaConfig(vocab_size=40, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, **TEXT)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=39))
    return model.requires_grad_(False).eval()


def batch(*pictures: int) -> dict[str, Any]:
    """Rows with so many pictures, of four tokens each, padded on the left."""
    most = max(pictures)
    pairs = zip(pictures, WORDS.tolist(), strict=False)
    ids = torch.tensor([[0] * 4 * (most - count) + [39] * 4 * count + words for count, words in pairs])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": PICTURES[: sum(pictures)]}


def opened(method: Any, model: Any) -> Any:
    handle = method.attach(model)
    with torch.no_grad():
        for name, parameter in handle.bank.named_parameters():
            if name.endswith(".g"):
                parameter.normal_()
    return handle


def prompts(model: Any) -> list[Any]:
    """Keys and values of what the prompts are when the model runs: what goes through k_proj besides the words."""
    seen: list[Any] = []
    for layer in model.model.language_model.layers:
        layer.self_attn.k_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


@torch.no_grad()
def test_the_picture_is_added_to_every_prompt_as_the_formula_says():
    model = llava()
    handle = opened(MultimodalLlamaAdapter(num_tokens=3, layers=2, levels=2, hidden=5), model)
    t, seen = handle.tensors(), prompts(model)
    model(**batch(1, 1))
    states = model.model.vision_tower(PICTURES[:2], output_hidden_states=True).hidden_states
    features = torch.cat([states[2][:, 0], states[3][:, 0]], -1)  # evenly up to the third, the last but one of four
    inside = torch.nn.functional.gelu(features @ t["model.down_weight"].T + t["model.down_bias"])
    added = inside @ t["model.up_weight"].T + t["model.up_bias"]
    found = [x for x in seen if x.shape[1] == 3]
    for layer, x in zip((1, 2), found, strict=True):
        P = t[f"model.language_model.layers.{layer}.self_attn.P"]
        torch.testing.assert_close(x, P + added[:, None])


@pytest.mark.parametrize(
    "method",
    [
        MultimodalLlamaAdapter(num_tokens=3, levels=2),
        *(pytest.param(method, marks=pytest.mark.slow) for method in (EARLY, LATE)),
    ],
)
@torch.no_grad()
def test_a_generation_keeps_its_pictures_and_the_next_one_has_its_own(method):
    model = llava()
    before = model(**batch(1, 1)).logits
    handle = opened(method, model)
    settings = {"max_new_tokens": 2, "do_sample": False}
    text = model.generate(**batch(1, 1), **settings)
    assert torch.equal(text, model.generate(**batch(1, 1), **settings, use_cache=False))
    shown = model(**batch(1, 1)).logits
    other = {**batch(1, 1), "pixel_values": -PICTURES[:2]}
    assert not torch.allclose(model(**other).logits, shown)
    beams = {"num_beams": 2, "num_return_sequences": 2}
    both = [model.generate(**batch(1, 1), **settings, **beams, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*both)
    words = model(WORDS).logits  # without a picture: nothing is left of the last one
    assert torch.equal(words, model(WORDS).logits)
    torch.testing.assert_close(model(**batch(1, 1)).logits, shown)
    handle.detach()
    assert torch.equal(model(**batch(1, 1)).logits, before)


@torch.no_grad()
def test_rows_with_none_or_two_pictures_get_their_mean():
    model = llava()
    opened(LATE, model)
    seen = prompts(model)
    model(**batch(2, 1))
    two = [x for x in seen if x.shape[1] == 3]
    seen.clear()
    model(**batch(0, 1) | {"pixel_values": PICTURES[2:]})
    one = [x for x in seen if x.shape[1] == 3]
    seen.clear()
    single = []
    for k in (0, 1):
        model(**batch(1) | {"pixel_values": PICTURES[k : k + 1]})
        single.append([x for x in seen if x.shape[1] == 3])
        seen.clear()
    model(WORDS)
    plain = [x for x in seen if x.shape[1] == 3]
    for layer in range(3):
        torch.testing.assert_close(two[layer][0], (single[0][layer][0] + single[1][layer][0]) / 2)
        torch.testing.assert_close(two[layer][1], one[layer][1])
        torch.testing.assert_close(one[layer][0], plain[layer][0])


def test_early_pictures_and_late_prompts_never_meet():
    model = llava()
    handle = opened(EARLY, model)
    gates = [site.name for site in handle.plan if site.role == "early"]
    assert gates == ["model.language_model.layers.0.self_attn"]
    seen = prompts(model)
    model(**batch(0, 1))
    assert [x.shape[1] for x in seen if x.shape[1] < 9] == [2, 3, 3]
    late = opened(LATE, llava())
    assert not [site for site in late.plan if site.role == "early"]
    # A row without a picture goes as if there were none at all, in a batch with others too.
    alone = model(WORDS[:1]).logits
    mixed = batch(0, 1)
    positions = (mixed["attention_mask"].cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(model(**mixed, position_ids=positions).logits[:1, 4:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [EARLY, LATE], ids=["early", "late"])
@torch.no_grad()
def test_a_pictures_tokens_are_learnt_queries_that_pass_blocks_with_its_features(method):
    """Composed of torch's own layers from the saved tensors; then what the first attention makes of them."""
    model = llava()
    handle = opened(method, model)
    seen, k = prompts(model), method.tokens
    attended: list[Any] = []
    layer = model.model.language_model.layers[0].self_attn
    layer.o_proj.register_forward_pre_hook(lambda module, args: attended.append(args[0]))
    model(**batch(1, 1))
    t = {name.removeprefix("model."): tensor for name, tensor in handle.tensors().items()}
    features = model.model.vision_tower(PICTURES[:2], output_hidden_states=True).hidden_states[-2]  # the projector's
    norm, linear = torch.nn.functional.layer_norm, torch.nn.functional.linear
    x = linear(features, t["into_weight"], t["into_bias"])
    x = norm(x, (16,), t["into_norm_weight"], t["into_norm_bias"])
    x = torch.cat([t["queries"].expand(2, -1, -1), x], 1)
    block = torch.nn.TransformerEncoderLayer(16, 16, 64, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    block.load_state_dict({name: t[f"blocks_0_{name.replace('.', '_')}"] for name in block.state_dict()})
    y = linear(block(x)[:, :k], t["out_weight"], t["out_bias"])
    y = norm(y, (24,), t["out_norm_weight"], t["out_norm_bias"])
    own = [x for x in seen if x.shape[1] == k]
    if method.fusion == "late":
        P = [t[f"language_model.layers.{i}.self_attn.P"] for i in range(3)]
        assert len(own) == 3
        for found, prompt in zip(own, P, strict=True):
            torch.testing.assert_close(found, prompt + y)
        return
    (found,) = (x for x in seen if x.shape[1] == 2)
    torch.testing.assert_close(found, y)
    with_picture, g = attended[0], t["language_model.layers.0.self_attn.g"]
    words = [x for x in seen if x.shape[1] > 3][0]
    cos, sin = model.model.language_model.rotary_emb(words, torch.arange(words.shape[1])[None])

    def heads(module: Any, x: Any) -> Any:  # one head of keys for two of queries
        return module(x).unflatten(-1, (-1, 12)).transpose(1, 2).expand(-1, 2, -1, -1)

    q = heads(layer.q_proj, words)
    a, b = q.chunk(2, -1)
    q = q * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]
    prompt = (q @ heads(layer.k_proj, y).mT / 12**0.5).softmax(-1) @ heads(layer.v_proj, y)
    for parameter in handle.bank.parameters():
        if parameter.shape == (1, 2):  # gates
            parameter.zero_()
    attended.clear()
    model(**batch(1, 1))
    expected = attended[0] + (g.tanh()[None, :, None, None] * prompt).transpose(1, 2).flatten(2)
    torch.testing.assert_close(with_picture, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["output", "input"])
@torch.no_grad()
def test_bias_and_scale_are_those_of_the_paper_or_of_the_code(where: Literal["output", "input"]):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=40, attention_bias=True, **TEXT))
    layer = model.model.layers[0].self_attn.q_proj
    W, own = layer.weight.clone(), layer.bias.normal_().clone()
    handle = LlamaAdapterV2(fusion="none", scale_at=where).attach(model)
    for parameter in handle.bank.parameters():
        parameter.normal_()
    t = handle.tensors()
    s, b = t["model.layers.0.self_attn.q_proj.s"], t["model.layers.0.self_attn.q_proj.b"]
    x = torch.randn(2, 3, 24)
    expected = s * (x @ W.T + own + b) if where == "output" else (s * x) @ W.T + own + b
    torch.testing.assert_close(layer(x), expected)
    norm = model.model.norm
    torch.testing.assert_close(norm(x), x * (x.square().mean(-1, True) + 1e-6).rsqrt() * t["model.norm.s"])


def test_captions_and_instructions_teach_parts_that_share_nothing():
    model, method = llava(), EARLY
    handle = opened(method, model)
    parts = method.parts(handle)
    assert not {*map(id, parts["captions"])} & {*map(id, parts["instructions"])}
    assert len(parts["captions"]) + len(parts["instructions"]) == len(list(handle.bank.parameters()))
    for part, other in (("captions", "instructions"), ("instructions", "captions")):
        handle.bank.zero_grad()
        with method.learning(handle, part):
            model(**batch(1, 1)).logits.square().mean().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in parts[part])
        assert all(parameter.grad is None for parameter in parts[other])
    assert all(parameter.requires_grad for parameter in handle.bank.parameters())
    with pytest.raises(InputError, match="use captions or instructions"), method.learning(handle, "all"):
        pass


@pytest.mark.slow
def test_sizes_on_llama_7b_with_clip_l():
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig())
    first = MultimodalLlamaAdapter().plan(model).parameters
    assert first == 1_229_760 + 64 * (4 * 1024 + 1) + 4096 * 65  # 1.76 M; the paper's is 1.8 M
    second = LlamaAdapterV2(fusion="late", visual_width=768)
    visual = 8 * (12 * 768**2 + 13 * 768) + 768 * (1024 + 3 + 10) + 4096 * (768 + 3)
    layers = 32 * (4 * 2 * 4096 + 2 * 2 * 11008 + 2 * 4096) + 2 * 4096 * 32 + 4096
    assert second.plan(model).parameters == visual + 31 * (10 * 4096 + 32) + layers


def test_what_shows_no_picture_is_refused():
    with pytest.raises(SiteError, match="reads no pictures"):
        MultimodalLlamaAdapter().attach(Llama(LlamaConfig(vocab_size=40, **TEXT)))
    model = llava()
    features = model.model.get_image_features(PICTURES[:2], return_dict=True)
    MultimodalLlamaAdapter(num_tokens=3).attach(model)
    given = batch(1, 1)
    del given["pixel_values"]
    with pytest.raises(SiteError, match="pass pixel_values"):
        model(**given, mm_encoder_outputs={"image": features})
    embeds = model.get_input_embeddings()(batch(2, 1)["input_ids"])
    with pytest.raises(SiteError, match="3 pictures for 2 rows of embedded words"):
        model(inputs_embeds=embeds, pixel_values=PICTURES)
    with pytest.raises(SiteError, match="4 places in the words for 3 pictures"):
        model(input_ids=batch(0, 1)["input_ids"], pixel_values=PICTURES)
