"""Compiled whole and once: what changes between two calls (route, strength, an adapter's values) is never code."""

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

from graft.studio.methods.adalora import AdaLoRA
from graft.studio.methods.bottleneck import Houlsby
from graft.studio.methods.dora import DoRA
from graft.studio.methods.dylora import DyLoRA
from graft.studio.methods.fish_mask import FishMask
from graft.studio.methods.ia3 import IA3
from graft.studio.methods.krona import KronA
from graft.studio.methods.lora import LoRA
from graft.studio.methods.prefix_tuning import PrefixTuning
from graft.studio.methods.prompt_tuning import PromptTuning
from graft.studio.methods.ssf import SSF

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
FEW = ("v", "up")
"""A packed projection and a plain one: a compiler takes seconds for each site more."""
ROUTES = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1], [1, 0, 0, 2]])


def vit():
    torch.manual_seed(0)
    settings = {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **settings).requires_grad_(False).eval()


def compiled_with(counter, model):
    torch.compiler.reset()
    return torch.compile(model, backend=counter, fullgraph=True)


def gradients(handle, out):
    return torch.autograd.grad(out.square().mean(), list(handle.bank.parameters()), allow_unused=True)


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=2, targets="all"), Houlsby(width=4), PromptTuning(length=3), PrefixTuning(length=3, hidden=4),
     *(pytest.param(each, marks=pytest.mark.slow)
       for each in (DoRA(rank=2, targets=FEW), AdaLoRA(rank=2, target_rank=1, targets=FEW), KronA(targets=FEW),
                    IA3(), SSF()))],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_adapters_routes_and_strengths_change_without_a_recompilation(method):
    model = vit()
    handle = method.attach(model, slots=3)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    handle.bank.eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compiled_with(counter, model)
    handle.route(ROUTES[0])
    compiled(X).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for route in ROUTES[1:]:
            handle.route(route)
            out = compiled(X)
            found, expected = gradients(handle, out), gradients(handle, plain := model(X))
            torch.testing.assert_close(out, plain)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            handle.load(handle.tensors(2), slot=1)
            if not isinstance(method, PromptTuning | PrefixTuning):  # they have no strength
                handle.scale(2, 0.5)
            torch.testing.assert_close(compiled(X), model(X))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", [PromptTuning(length=3), PrefixTuning(length=3, hidden=4)], ids=["prompt", "prefix"])
def test_a_decoder_with_prompts_compiles_whole_and_once(method):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **size)).requires_grad_(False).eval()
    ids = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(1))
    handle = method.attach(model, slots=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compiled_with(counter, model)
    handle.route(ROUTES[0])
    compiled(ids, use_cache=False).logits.sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for route in ROUTES[1:]:
            handle.route(route)
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_one_adapter_for_all_rows_is_a_program_of_its_own_and_stays_beside_the_other():
    model = vit()
    handle = LoRA(rank=2, targets=FEW).attach(model, slots=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compiled_with(counter, model)
    for route in (None, ROUTES[0]):
        handle.route(route)
        compiled(X)
    with torch.compiler.set_stance("fail_on_recompile"):
        for route in (None, ROUTES[1], None, ROUTES[2]):
            handle.route(route)
            handle.scale(0, 0.3)
            compiled(X)
    assert counter.frame_count == 2


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torchs_transformer_layer_compiles_whole(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).requires_grad_(False)
    model, x = nn.Sequential(layer).train(training), torch.randn(4, 5, 16)
    handle = LoRA(rank=2, targets=("v", "o", "linear1")).attach(model, slots=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compiled_with(counter, model)
    handle.route(ROUTES[0])
    compiled(x).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        handle.route(ROUTES[1])
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=2, targets=("v", "patch_embed.proj"), dropout=0.5),
     pytest.param(DoRA(rank=2, targets=FEW, dropout=0.5), marks=pytest.mark.slow),
     pytest.param(DyLoRA(rank=4, targets=FEW), marks=pytest.mark.slow)],
    ids=["lora", "dora", "dylora"],
)  # fmt: skip
def test_what_is_drawn_in_training_is_drawn_anew_in_each_call(method):
    model = vit()
    handle = method.attach(model)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compiled_with(counter, model)
    torch.manual_seed(0)
    handle.before_step(0, 40)
    outs = [compiled(X)]
    outs[0].sum().backward()
    assert all(parameter.grad is not None for parameter in handle.bank.parameters())
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 9):
            handle.before_step(step, 40)
            outs.append(compiled(X))
    assert len({out.sum().item() for out in outs}) > 2
    assert counter.frame_count == 1


def test_a_dropped_input_has_the_right_mean_when_compiled():
    model = nn.Sequential(nn.Linear(64, 3)).requires_grad_(False)
    handle = LoRA(rank=2, targets="0", dropout=0.25).attach(model)
    nn.init.normal_(handle.bank.get_parameter("0.B"))
    x = torch.randn(1, 64).expand(20_000, 64)
    compiled = compiled_with(CompileCounterWithBackend("aot_eager"), model)
    mean = compiled(x).mean(0)
    handle.bank.eval()
    torch.testing.assert_close(mean, model(x[:1])[0], rtol=0, atol=0.05)


def test_a_weight_changed_in_place_compiles_whole():
    model = vit()
    method = FishMask(density=0.1, targets=("qkv", "norm"))
    handle = method.attach(model, places=method.choose(model, (model(row[None]).square().mean() for row in X)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compiled_with(counter, model)
    compiled(X).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        handle.scale(0, 0.5)
        torch.testing.assert_close(compiled(X), model(X))
    assert counter.frame_count == 1
