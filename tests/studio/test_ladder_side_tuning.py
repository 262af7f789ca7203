"""Ladder side-tuning against its formula, with caches and padding; what it and LoRA-FA keep for the backward pass."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from graft.studio.errors import InputError, SiteError
from graft.studio.methods.ladder_side_tuning import LadderSideTuning
from graft.studio.methods.lora import LoRA
from graft.studio.methods.lora_fa import LoRAFA

SIZE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
IDS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0


def make(family: str = "Llama", **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZE, **more)
    return getattr(transformers, f"{family}ForCausalLM")(config).requires_grad_(False).eval()


def moved(model: nn.Module, method: LadderSideTuning, slots: int = 1) -> Any:
    handle = method.attach(model, slots)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    handle.bank.eval()
    return handle


@torch.no_grad()
def test_it_is_the_formula_of_the_ladder():
    model = make()
    base = model.model(IDS, output_hidden_states=True, use_cache=False)
    handle = moved(model, LadderSideTuning(reduction=2, every=2))
    t = {name.removeprefix("model."): tensor for name, tensor in handle.tensors().items()}
    found = model.model(IDS).last_hidden_state
    # The blocks are a Llama of half the width, whose heads are as wide as before.
    thin = transformers.LlamaConfig(**{**SIZE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                                       "num_attention_heads": 2, "num_key_value_heads": 1}, head_dim=8)  # fmt: skip
    side = transformers.LlamaModel(thin)
    for k, block in enumerate(side.layers):
        own = {name: t[f"blocks_{k}_{name.replace('.', '_')}"] for name, _ in block.named_parameters()}
        block.load_state_dict(own)
    side.norm.weight.data = t["norm_weight"]
    places = torch.arange(7)[None]
    turns, mask = side.rotary_emb(base.last_hidden_state, places), torch.full((7, 7), float("-inf")).triu(1)
    s = base.hidden_states[0] @ t["downs_0_weight"].T
    for k, layer in enumerate((1, 3)):
        mu = torch.sigmoid(t["gates"][k] / 0.1)
        h: list[Tensor] = []
        if layer == 3:  # the last hidden state that transformers tells is behind the norm
            h = [model.model.layers[3](base.hidden_states[3], position_embeddings=model.model.rotary_emb(s, places),
                                       attention_mask=mask[None, None])]  # fmt: skip
        state = h[0] if h else base.hidden_states[layer + 1]
        s = side.layers[k](mu * s + (1 - mu) * state @ t[f"downs_{k + 1}_weight"].T, position_embeddings=turns,
                           attention_mask=mask[None, None])  # fmt: skip
    torch.testing.assert_close(found, base.last_hidden_state + side.norm(s) @ t["up_weight"].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Llama", {}),
        pytest.param("Qwen3", {"head_dim": 12}, marks=pytest.mark.slow),
        pytest.param("SmolLM3", {}, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_generation_with_a_cache_is_that_without_and_rows_choose(family, more):
    model = make(family, **more)
    settings = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 3, "do_sample": False}
    plain = model.generate(**settings)
    handle = moved(model, LadderSideTuning(reduction=2), slots=2)
    text = model.generate(**settings)
    assert torch.equal(text, model.generate(**settings, use_cache=False))
    assert torch.equal(
        model.generate(**settings, num_beams=2), model.generate(**settings, num_beams=2, use_cache=False)
    )
    handle.route(torch.tensor([1, -1, 0]))
    mixed = model.generate(**settings)
    assert torch.equal(mixed[1], plain[1])
    assert torch.equal(mixed[2], text[2])
    assert torch.equal(mixed, model.generate(**settings, use_cache=False))


@torch.no_grad()
def test_a_side_as_wide_as_the_model_is_the_model_itself():
    """Nothing is cut away then, so each block gives the next hidden state for the one before it."""
    for model in (make(), make("Qwen3", head_dim=12), make("SmolLM3")):
        side: Any = LadderSideTuning(reduction=1).side(model.model)
        for block, layer in zip(side.blocks, model.model.layers, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(block.parameters(), layer.parameters(), strict=True))
        assert torch.equal(side.norm.weight, model.model.norm.weight)


@torch.no_grad()
def test_blocks_are_cut_out_where_the_weights_are_large():
    """Weights with loud places: those, and nothing else, must be what stays, wherever they are read."""
    model = make()
    stream, inside = torch.tensor([0, 3, 4, 9, 10, 11, 17, 18, 20, 21, 25, 26, 27, 29, 30, 31]), torch.arange(24) * 2
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[stream] *= 3
        layer.mlp.up_proj.weight[inside] *= 3
        layer.self_attn.v_proj.weight[8:] *= 3  # the second head of keys and values, which heads 2 and 3 share
        layer.self_attn.q_proj.weight[8:16] *= 2.5  # the loudest, but of the other one
        layer.self_attn.q_proj.weight[24:] *= 2
    for norm in (model.model.norm, *(layer.input_layernorm for layer in model.model.layers)):
        norm.weight.normal_()
    side: Any = LadderSideTuning(reduction=4, every=3).side(model.model)
    assert side.taken == [0, 3] and side.blocks[0].self_attn.q_proj.weight.shape == (8, 8)
    loud = sum(
        layer.self_attn.o_proj.weight.abs().sum(1) + layer.mlp.down_proj.weight.abs().sum(1)
        for layer in (model.model.layers[0], model.model.layers[3])
    )
    kept = loud.topk(8).indices.sort().values
    assert set(kept.tolist()) <= set(stream.tolist())
    for block, layer in zip(side.blocks, (model.model.layers[0], model.model.layers[3]), strict=True):
        a, b = layer.self_attn, block.self_attn
        gate, up = layer.mlp.gate_proj.weight[:, kept], layer.mlp.up_proj.weight[:, kept]
        rows = (gate.abs().sum(1) + up.abs().sum(1)).topk(12).indices.sort().values
        assert set(rows.tolist()) <= set(inside.tolist())
        assert torch.equal(b.k_proj.weight, a.k_proj.weight[8:][:, kept])
        assert torch.equal(b.v_proj.weight, a.v_proj.weight[8:][:, kept])
        assert torch.equal(b.q_proj.weight, a.q_proj.weight[24:][:, kept])
        assert torch.equal(b.o_proj.weight, a.o_proj.weight[kept][:, 24:])
        assert torch.equal(block.mlp.up_proj.weight, up[rows])
        assert torch.equal(block.mlp.down_proj.weight, layer.mlp.down_proj.weight[kept][:, rows])
        assert torch.equal(block.input_layernorm.weight, layer.input_layernorm.weight[kept])
    assert torch.equal(side.norm.weight, model.model.norm.weight[kept])


def test_blocks_are_cut_out_where_the_fisher_information_is():
    """From plain gradients of each sample; magnitudes would keep other parts."""

    def losses(model: Any) -> Any:
        return (cross_entropy(model(row[None]).logits[0, :-1], row[1:]) for row in IDS)

    twin = make().requires_grad_(True)
    F = {name: torch.zeros_like(weight) for name, weight in twin.named_parameters()}
    for loss in losses(twin):
        twin.zero_grad()
        loss.backward()
        for name, weight in twin.named_parameters():
            F[name] += weight.grad**2

    def rows(layer: int, part: str, columns: Any = slice(None)) -> Tensor:
        return F[f"model.layers.{layer}.{part}.weight"][:, columns].sum(1)

    model = make()
    before = model(IDS).logits
    handle = LadderSideTuning(reduction=4, every=3, pruning="fisher").attach(model, losses=losses(model))
    assert torch.equal(model(IDS).logits, before) and not any(p.requires_grad for p in model.parameters())
    stream = torch.stack([rows(i, part) for i in (0, 3) for part in ("self_attn.o_proj", "mlp.down_proj")])
    kept = stream.sum(0).topk(8).indices.sort().values
    for reset in (False, True):
        if reset:
            handle.reset(0, 5)
        t = handle.tensors()
        for k, i in enumerate((0, 3)):
            size = {name: rows(i, f"self_attn.{name}_proj", kept).view(-1, 8).sum(1) for name in "qkv"}
            key = int((size["q"].view(2, 2).sum(1) + size["k"] + size["v"]).argmax())
            query = 2 * key + int(size["q"].view(2, 2)[key].argmax())
            inside = (rows(i, "mlp.gate_proj", kept) + rows(i, "mlp.up_proj", kept)).topk(12).indices.sort().values
            attention, mlp, name = twin.model.layers[i].self_attn, twin.model.layers[i].mlp, f"model.blocks_{k}"
            q, v = slice(8 * query, 8 * query + 8), slice(8 * key, 8 * key + 8)
            assert torch.equal(t[f"{name}_self_attn_q_proj_weight"], attention.q_proj.weight[q][:, kept])
            assert torch.equal(t[f"{name}_self_attn_v_proj_weight"], attention.v_proj.weight[v][:, kept])
            assert torch.equal(t[f"{name}_self_attn_o_proj_weight"], attention.o_proj.weight[kept][:, q])
            assert torch.equal(t[f"{name}_mlp_up_proj_weight"], mlp.up_proj.weight[inside][:, kept])
    with torch.no_grad():
        pruned: Any = LadderSideTuning(reduction=4, every=3).side(model.model)
    assert not torch.equal(pruned.blocks[0].mlp.up_proj.weight, t["model.blocks_0_mlp_up_proj_weight"])
    with pytest.raises(InputError, match=r"pruning = 'fisher'.*attach\(losses=...\), or set pruning = 'magnitude'"):
        LadderSideTuning(pruning="fisher").attach(make())
    with pytest.raises(InputError, match="give a generator"):
        LadderSideTuning(pruning="fisher").attach(make(), losses=[torch.zeros(())])


@torch.no_grad()
def test_a_start_may_be_drawn_and_neither_changes_the_model():
    for pruning in ("magnitude", "none"):
        model = make()
        before = model(IDS).logits
        handle = LadderSideTuning(reduction=2, pruning=pruning).attach(model)  # type: ignore[arg-type]
        assert torch.equal(model(IDS).logits, before)
        own = handle.tensors()["model.blocks_0_self_attn_q_proj_weight"]
        pieces = [row[:, None] == model.model.layers[0].self_attn.q_proj.weight.flatten() for row in own]
        assert all(bool(piece.any(1).all()) == (pruning == "magnitude") for piece in pieces)
        handle.reset(0, 5)
        assert torch.equal(handle.tensors()["model.blocks_0_self_attn_q_proj_weight"], own) == (pruning == "magnitude")
    packed = make("Phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0})
    with pytest.raises(SiteError, match="qkv_proj.*not known what to cut out.*set pruning = 'none'"):
        LadderSideTuning(reduction=2).attach(packed)
    assert len(LadderSideTuning(reduction=2, pruning="none").plan(packed)) == 1


class Kept:
    """Bytes of activations that autograd keeps while it is open; a tensor that is kept twice counts once."""

    def __init__(self, model: nn.Module):
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.found: dict[int, Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self.weights:
            self.found[place] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.found.values())


def kept(model: nn.Module, run: Any) -> int:
    seen = Kept(model)
    with seen.hooks:
        run()
    return seen.bytes


def test_the_trunk_keeps_nothing_and_the_side_less_than_lora():
    """On one model: LoRA-FA keeps less than LoRA, the ladder less than both; of the trunk itself nothing is kept."""
    model = make()
    x = torch.randint(3, 50, (2, 64))
    counts, inside = {}, []
    for method in (LoRA(rank=2, targets="all-linear"), LoRAFA(rank=2, targets="all-linear"), LadderSideTuning()):
        handle = method.attach(model)
        if isinstance(method, LadderSideTuning):
            kinds = (nn.Linear, type(model.model.norm))
            hooks = [m.register_forward_hook(lambda m, a, out: inside.append(out.requires_grad))
                     for m in model.model.layers.modules() if isinstance(m, kinds)]  # fmt: skip
        counts[type(method).__name__] = kept(model, lambda: model.model(x, use_cache=False).last_hidden_state)
        handle.detach()
    for hook in hooks:
        hook.remove()
    assert inside and not any(inside)
    assert counts["LadderSideTuning"] < counts["LoRAFA"] < counts["LoRA"]


def test_what_is_trained_before_it_is_refused():
    model = make()
    LadderSideTuning(reduction=2).attach(model)
    with pytest.raises(SiteError, match="no gradient passes it"):
        model(inputs_embeds=torch.randn(1, 3, 32, requires_grad=True))
    with pytest.raises(SiteError, match="the site is the model itself"):
        LadderSideTuning(reduction=2).attach(make().model)
    assert len(LadderSideTuning(reduction=2).attach({"model": make().model}).plan) == 1
    small = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)
    with pytest.raises(SiteError, match="no list of layers"):
        LadderSideTuning().attach(transformers.GPT2LMHeadModel(small))
