"""LLaMA-Adapter against its formula and peft, on several decoders of transformers, with padding, caches and routes."""

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from graft.llm_mm.llama_adapter import LlamaAdapter
from graft.llm_mm.llama_adapter_v2 import LlamaAdapterV2
from graft.studio.adapter import Adapter, Card, base_hash, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import SiteError

SIZE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FAMILIES = {"Llama": {}, "Mistral": {"head_dim": 12}, "Qwen2": {}, "Qwen3": {"head_dim": 16}, "SmolLM3": {}}
IDS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0


def make(family: str = "Llama", **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZE, **FAMILIES[family], **more)
    return getattr(transformers, f"{family}ForCausalLM")(config).requires_grad_(False).eval()


METHOD = LlamaAdapter(num_tokens=4, layers=2)


def opened(model: nn.Module, slots: int = 1) -> Any:
    handle = METHOD.attach(model, slots)
    with torch.no_grad():
        for name, parameter in handle.bank.named_parameters():
            if name.endswith(".g"):
                parameter.normal_()
    return handle


SLOW = ("Mistral", "Qwen2")
every_family = pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.slow] * (family in SLOW)) for family in FAMILIES]
)


@every_family
@torch.no_grad()
def test_it_starts_at_the_base_and_leaves_it_so(family):
    model = make(family)
    before, classes = model(IDS, attention_mask=MASK).logits, [type(module) for module in model.modules()]
    handle = LlamaAdapter(num_tokens=4, layers=2).attach(model)
    assert torch.equal(model(IDS, attention_mask=MASK).logits, before)
    assert [site.name for site in handle.plan] == [f"model.layers.{i}.self_attn" for i in (1, 2)]
    for name, parameter in handle.bank.named_parameters():
        parameter.normal_() if name.endswith(".g") else None
    assert not torch.allclose(model(IDS, attention_mask=MASK).logits, before)
    handle.detach()
    assert torch.equal(model(IDS, attention_mask=MASK).logits, before)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(
    ("family", "attention"),
    [("Llama", "eager"), ("Qwen3", "sdpa"), pytest.param("SmolLM3", "sdpa", marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_generation_with_a_cache_is_that_without_and_padding_changes_nothing(family, attention):
    model = make(family, attn_implementation=attention)
    opened(model)
    settings = {"max_new_tokens": 3, "do_sample": False, "input_ids": IDS, "attention_mask": MASK}
    text = model.generate(use_cache=True, **settings)
    assert torch.equal(text, model.generate(use_cache=False, **settings))
    # The queries' rotation meets prompts that have none: positions count from the first word, as in generate.
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    padded = model(IDS, attention_mask=MASK, position_ids=positions).logits[1:2, 3:]
    torch.testing.assert_close(padded, model(IDS[1:2, 3:]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", pytest.param("Mistral", marks=pytest.mark.slow)])
@torch.no_grad()
def test_one_attention_is_the_formula(family):
    """Keys shared by heads, heads of any width, and keys that are normalised, the prompt's too."""
    model = make(family, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    attention = model.model.layers[2].self_attn
    norms: dict[str, Any] = {name: getattr(attention, f"{name}_norm", lambda x: x) for name in "qk"}
    if family == "Qwen3":
        for norm in norms.values():
            norm.weight.normal_()
    handle = opened(model)
    P, g = (handle.tensors()[f"model.layers.2.self_attn.{name}"] for name in ("P", "g"))
    x, d = torch.randn(2, 6, 32), attention.head_dim
    cos, sin = model.model.rotary_emb(x, torch.arange(6)[None])
    found, _ = attention(x, position_embeddings=(cos, sin), attention_mask=None)

    def heads(name, x):
        h = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, d))
        h = norms.get(name, lambda x: x)(h).transpose(1, 2)
        return h.repeat_interleave(4 // h.shape[1], 1)

    def rotated(h):
        a, b = h.chunk(2, -1)
        return h * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    q, k, v = rotated(heads("q", x)), rotated(heads("k", x)), heads("v", x)
    mask = torch.full((6, 6), float("-inf")).triu(1)
    words = ((q @ k.mT / d**0.5 + mask).softmax(-1)) @ v
    prompt = (q @ heads("k", P[None]).mT / d**0.5).softmax(-1) @ heads("v", P[None])
    expected = attention.o_proj((words + g.tanh()[None, :, None, None] * prompt).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gates_learn_first_and_then_the_prompts():
    model = make()
    handle = LlamaAdapter(num_tokens=4, layers=2).attach(model)
    optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        logits = model(IDS).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        for name, parameter in handle.bank.named_parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) is (name.endswith(".g") or step == 1), (name, step)
        optimizer.step()


def test_a_7b_has_1_23_million_and_its_first_layers_keep_nothing():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())  # the shapes of LLaMA 7B
    assert LlamaAdapter().plan(model).parameters == 30 * (10 * 4096 + 32) == 1_229_760
    small = make()
    LlamaAdapter(layers=1).attach(small)
    seen = []
    for layer in small.model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    small(IDS)
    assert seen == [False, False, True]


@torch.no_grad()
def test_peft_gives_the_same_where_all_heads_have_one_gate():
    ours, base = make(), make()
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    theirs: Any = peft.get_peft_model(base, config)
    handle = LlamaAdapter(num_tokens=4, layers=2).attach(ours)
    tensors = handle.tensors()
    for layer, gate in ((1, 0.5), (2, -0.3)):
        adapted = base.model.layers[layer].self_attn
        adapted.adaption_gate.fill_(gate)
        tensors[f"model.layers.{layer}.self_attn.P"] = adapted.adaption_prompt[0]
        tensors[f"model.layers.{layer}.self_attn.g"] = torch.full((4,), gate).atanh()
    handle.load(tensors)
    found, expected = (model(IDS, attention_mask=MASK).logits[MASK.bool()] for model in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Mistral", pytest.param("Qwen2", marks=pytest.mark.slow)])
@torch.no_grad()
def test_rows_choose_and_generate_with_their_own(family):
    model = make(family)
    settings = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(IDS, **settings)
    handle = opened(model, slots=2)
    handle.route(torch.tensor([1, -1, 0]))
    text = model.generate(IDS, **settings)
    assert torch.equal(text[1], plain[1])
    for row, slot in ((0, 1), (2, 0)):
        handle.route(torch.tensor([slot]))
        assert torch.equal(text[row : row + 1], model.generate(IDS[row : row + 1], **settings))


@every_family
@torch.no_grad()
def test_the_second_version_starts_at_the_base_and_generates_with_its_cache(family):
    model = make(family)
    before, settings = model(IDS, attention_mask=MASK).logits, {"max_new_tokens": 3, "do_sample": False}
    handle = LlamaAdapterV2(num_tokens=2, layers=2, fusion="none").attach(model, 2)
    assert torch.equal(model(IDS, attention_mask=MASK).logits, before)
    linear = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    found = {site.name.removeprefix("model.") for site in handle.plan if site.kind == "linear"}
    assert found == set(linear)  # bias and scale are everywhere, prompts in the last layers
    assert [site.name for site in handle.plan if site.kind == "kv"] == [f"model.layers.{i}.self_attn" for i in (1, 2)]
    for parameter in handle.bank.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    handle.route(torch.tensor([1, -1, 0]))
    text = model.generate(IDS, attention_mask=MASK, **settings)
    assert torch.equal(text, model.generate(IDS, attention_mask=MASK, **settings, use_cache=False))
    logits = model(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(logits[1], before[1])
    assert not torch.allclose(logits[0], before[0]) and not torch.allclose(logits[2], before[2])


@torch.no_grad()
def test_a_saved_one_answers_the_same_and_another_base_is_refused(tmp_path):
    model = make()
    handle = opened(model)
    expected = model(IDS).logits
    handle.detach()
    card = Card("llama_adapter", to_dict(METHOD), "llm_mm", base_hash=base_hash({"": model}))
    Adapter(handle.tensors(), Card(**{**card.__dict__, "sites": handle.plan.to_list()})).save(tmp_path)
    with load_adapter(tmp_path).attached(fresh := make()):
        assert torch.equal(fresh(IDS).logits, expected)
    with pytest.raises(SiteError, match=r"planned for \(4, 32\) heads and width"):
        METHOD.attach(make_wider(), plan=handle.plan)


def make_wider() -> Any:
    config = transformers.LlamaConfig(**{**SIZE, "hidden_size": 64})
    return transformers.LlamaForCausalLM(config)


def test_checkpointing_and_two_adapters_at_once():
    model = make()
    first, second = opened(model), opened(model)
    model(IDS).logits.square().mean().backward()
    plain = [parameter.grad.clone() for parameter in first.bank.parameters()]
    first.bank.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    model(IDS).logits.square().mean().backward()
    for parameter, expected in zip(first.bank.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
    both = model(IDS).logits
    second.detach()
    assert not torch.allclose(model(IDS).logits, both)


def test_what_has_no_such_attention_is_refused():
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}
    with pytest.raises(SiteError, match="none of its attentions has layers q_proj"):
        LlamaAdapter().attach(transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)))
