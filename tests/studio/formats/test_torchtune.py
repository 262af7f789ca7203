"""torchtune's files, against its Llama in plain torch: its names, its rotation, its LoRALinear and DoRALinear."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.cli import main
from graft.studio.config import to_dict
from graft.studio.errors import FormatError, InputError
from graft.studio.methods.dora import DoRA
from graft.studio.methods.lora import LoRA

HEADS, KV, WIDTH, HEAD = 4, 2, 32, 8
IDS = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(0))
ALL = ("q", "k", "v", "o", "gate", "up", "down", "head")


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV, vocab_size=50,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def rotated(x):
    """torchtune's positions: neighbouring numbers of a head turn together; x (b, n, heads, width)."""
    angle = torch.arange(x.shape[1])[:, None] / 10_000 ** (torch.arange(0, HEAD, 2) / HEAD)
    cos, sin, (a, b) = angle.cos()[:, None], angle.sin()[:, None], x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def torchtune(model, tensors, alpha):
    """What torchtune's Llama gives with the weights of transformers' in its own order, and its LoRALinear."""
    w = model.state_dict()

    def turned(weight):
        return weight.unflatten(0, (-1, 2, HEAD // 2)).transpose(1, 2).flatten(0, 2)

    def linear(name, weight, x):
        out = F.linear(x, weight)
        if f"{name}.lora_a.weight" in tensors:
            a, b = tensors[f"{name}.lora_a.weight"], tensors[f"{name}.lora_b.weight"]
            change = (alpha / len(a)) * F.linear(F.linear(x, a), b)
            if f"{name}.magnitude" in tensors:
                scale = tensors[f"{name}.magnitude"] / (weight + alpha / len(a) * b @ a).norm(dim=1)
                change = (scale - 1) * out + scale * change
            out = out + change
        return out

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w[name]

    x = w["model.embed_tokens.weight"][IDS]
    for k in range(2):
        theirs, ours = f"layers.{k}", f"model.layers.{k}"
        y = norm(x, f"{ours}.input_layernorm.weight")
        q, key, v = (
            linear(f"{theirs}.attn.{p}_proj", turned(weight) if p in "qk" else weight, y).unflatten(-1, (-1, HEAD))
            for p in "qkv"
            for weight in [w[f"{ours}.self_attn.{p}_proj.weight"]]
        )
        q, key, v = (t.repeat_interleave(HEADS // t.shape[2], 2).transpose(1, 2) for t in (rotated(q), rotated(key), v))
        y = F.scaled_dot_product_attention(q, key, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + linear(f"{theirs}.attn.output_proj", w[f"{ours}.self_attn.o_proj.weight"], y)
        y = norm(x, f"{ours}.post_attention_layernorm.weight")
        gate = F.silu(linear(f"{theirs}.mlp.w1", w[f"{ours}.mlp.gate_proj.weight"], y))
        y = gate * linear(f"{theirs}.mlp.w3", w[f"{ours}.mlp.up_proj.weight"], y)
        x = x + linear(f"{theirs}.mlp.w2", w[f"{ours}.mlp.down_proj.weight"], y)
    return linear("output", w["lm_head.weight"], norm(x, "model.norm.weight"))


def trained(targets, cls=LoRA, name="lora", details=None):
    model, method = llama(), cls(rank=2, alpha=5, targets=targets)
    handle = method.attach(model)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    expected = model(IDS).logits
    handle.detach()
    details = {"head_dim": HEAD} if details is None else details
    card = Card(name, to_dict(method), sites=handle.plan.to_list(), details=details)
    return Adapter(handle.tensors(), card), expected


def test_the_reference_is_the_model():
    torch.testing.assert_close(torchtune(llama(), {}, 1), llama()(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [ALL, ("q", "k"), ("v", "o"), ("head",)])
def test_torchtune_gives_the_same_with_our_export(tmp_path, targets):
    adapter, expected = trained(targets)
    file, config = adapter.export(tmp_path, "torchtune")
    settings = json.loads(config.read_text())
    theirs = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "output_proj", "gate": "w1", "down": "w2", "up": "w3",
              "head": "output"}  # fmt: skip
    assert (file.name, set(settings["target_modules"])) == ("adapter_0.safetensors", {theirs[t] for t in targets})
    got = torchtune(llama(), load_file(file), settings["lora_alpha"])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for path in (tmp_path, file):
        model, again = llama(), load_adapter(path)
        with again.attached(model):
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert again.card.details.get("head_dim") == (HEAD if {"q", "k"} & set(targets) else None)


def test_a_dora_is_the_same_in_torchtune_both_ways(tmp_path):
    adapter, expected = trained(ALL, DoRA, "dora")
    file, config = adapter.export(tmp_path, "torchtune")
    tensors, alpha = load_file(file), json.loads(config.read_text())["lora_alpha"]
    torch.testing.assert_close(torchtune(llama(), tensors, alpha), expected, rtol=1e-4, atol=1e-5)
    with load_adapter(tmp_path).attached(model := llama()):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    del tensors["layers.1.attn.v_proj.magnitude"]
    save_file(tensors, file)
    with pytest.raises(FormatError, match=r"layers\.1\.attn\.v_proj: a DoRA in which lengths"):
        load_adapter(tmp_path)


def test_we_give_the_same_with_torchtunes_own_factors(tmp_path):
    torch.manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for k in range(2):
        for name, out in (("q_proj", WIDTH), ("k_proj", KV * HEAD)):
            at = f"layers.{k}.attn.{name}"
            tensors |= {f"{at}.lora_a.weight": torch.randn(3, WIDTH), f"{at}.lora_b.weight": torch.randn(out, 3)}
    save_file(tensors, tmp_path / "adapter_2.safetensors")
    config = {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"does not say how wide one is. tell it .*--head-dim"):
        load_adapter(tmp_path)
    expected = torchtune(llama(), tensors, 4)
    with load_adapter(tmp_path, head_dim=HEAD).attached(model := llama()):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "head_dim": HEAD}))
    with load_adapter(tmp_path).attached(model := llama()):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=f"head_dim 4: .*adapter_config.json says {HEAD}"):
        load_adapter(tmp_path, head_dim=4)


def test_the_command_line_tells_how_wide_a_head_is(tmp_path, capsys):
    """From a native adapter that does not know it to torchtune, and from torchtune, whose own files do not tell it."""
    adapter, expected = trained(("q", "k"), details={})
    adapter.save(tmp_path / "native")

    def convert(source, to, *more):
        return main(["adapters", "convert", str(tmp_path / source), str(tmp_path / to), "--to", to, *more])

    assert convert("native", "torchtune") == 2
    assert "--head-dim" in capsys.readouterr().err
    assert convert("native", "torchtune", "--head-dim", "12") == 2
    assert "head_dim 12: " in capsys.readouterr().err
    assert convert("native", "torchtune", "--head-dim", str(HEAD)) == 0
    file, config = tmp_path / "torchtune" / "adapter_0.safetensors", tmp_path / "torchtune" / "adapter_config.json"
    settings = json.loads(config.read_text())
    assert settings.pop("head_dim") == HEAD
    got = torchtune(llama(), load_file(file), settings["lora_alpha"])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    config.write_text(json.dumps(settings))  # as torchtune writes it
    assert convert("torchtune", "peft") == 2
    assert convert("torchtune", "peft", "--head-dim", str(HEAD)) == 0
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "peft")
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("layers.0.attn.z_proj.lora_a.weight", "no module of torchtune's Llama"),
        ("layers.0.attn.v_proj.lora_bias", "not a LoRA factor"),
    ],
)
def test_unknown_keys_are_named(tmp_path, key, match):
    adapter, _ = trained(("v",))
    file, _ = adapter.export(tmp_path, "torchtune")
    tensors = {**load_file(file), key: torch.zeros(2, 2)}
    if key.endswith("lora_a.weight"):
        tensors[key.replace("lora_a", "lora_b")] = torch.zeros(2, 2)
    save_file(tensors, file)
    with pytest.raises(FormatError, match=f"{key.split('.lora')[0]}.*{match}"):
        load_adapter(tmp_path)


def test_what_torchtune_cannot_express_is_refused(tmp_path):
    refused = [
        (trained(("q",), details={})[0], r"q_proj: .*tell it .*--head-dim"),
        (trained(("gate", "up"))[0], "mlp.w1, mlp.w3: torchtune adapts gate, down and up together"),
        (trained((r"layers.1.self_attn.v_proj",))[0], "layers.0.attn.v_proj: torchtune adapts it in every layer"),
        (trained(("embedding",))[0], "model.embed_tokens: torchtune has no LoRA of it"),
    ]
    for adapter, match in refused:
        with pytest.raises(InputError, match=match):
            adapter.export(tmp_path, "torchtune")
    assert list(tmp_path.iterdir()) == []
