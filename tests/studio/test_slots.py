import time
from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

from graft.studio.errors import FormatError, InputError, SiteError
from graft.studio.methods.lora import LoRA
from graft.studio.sites import Plan, Site


def vit(name="vit_tiny_patch16_224", **settings):
    torch.manual_seed(0)
    settings = {"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 3} | settings
    return timm.create_model(name, **settings).requires_grad_(False).eval()


@pytest.fixture
def x():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def attach(model, slots=1, **settings):
    """A handle whose factors are all random, so that every slot does something."""
    handle = LoRA(rank=2, **({"targets": "all"} | settings)).attach(model, slots)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    handle.bank.eval()
    return handle


def test_the_base_stays_what_it_was(x):
    model, plain = vit(), vit()
    handle = attach(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert isinstance(model.blocks[0].mlp.fc1, nn.Linear)
    model.load_state_dict(plain.state_dict())
    assert not torch.equal(model(x), plain(x))
    handle.detach()
    assert torch.equal(model(x), plain(x))
    assert type(model.blocks[0].mlp.fc1) is nn.Linear
    assert vars(model.blocks[0].mlp.fc1).keys() == vars(plain.blocks[0].mlp.fc1).keys()


def test_a_deep_copy_has_an_adapter_of_its_own(x):
    model = vit()
    handle = attach(model)
    adapted, twin = model(x), deepcopy(model)
    handle.detach()
    assert torch.equal(twin(x), adapted)
    assert not torch.equal(model(x), adapted)


def test_rows_choose_their_slot(x):
    model = vit()
    base = model(x)
    handle = attach(model, slots=3)
    handle.route(torch.tensor([2, -1, 0, 1]))
    mixed = model(x)
    assert torch.equal(mixed[1], base[1])
    for row, slot in ((0, 2), (2, 0), (3, 1)):
        handle.route(torch.full((4,), slot))
        torch.testing.assert_close(mixed[row], model(x)[row])
    handle.route(None)
    torch.testing.assert_close(mixed[2], model(x)[2])


def test_a_mixed_batch_trains_every_slot_as_if_alone(x):
    model = vit()
    handle = attach(model, slots=2)
    parameters = list(handle.bank.parameters())
    route = torch.tensor([0, 1, 1, 0])
    handle.route(route)
    together = torch.autograd.grad(model(x).square().sum(), parameters)
    for slot in range(2):
        handle.route(torch.full((2,), slot))
        alone = torch.autograd.grad(model(x[route == slot]).square().sum(), parameters)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[slot], b[slot], rtol=1e-4, atol=1e-5)


def test_handles_on_the_same_sites_add_up_and_come_off_in_any_order(x):
    model = vit(depth=1)
    base = model(x)
    first, second = attach(model), attach(model, targets=("q", "attn.proj"))
    site = model.blocks[0].attn.proj
    h = torch.randn(2, 16)
    deltas = [
        handle._slots[[s.name for s in handle.plan].index("blocks.0.attn.proj")].delta(0) for handle in (first, second)
    ]
    expected = nn.functional.linear(h, site._parameters["weight"] + sum(deltas), site.bias)
    torch.testing.assert_close(site(h), expected)
    first.detach()
    alone = model(x)
    second.detach()
    assert torch.equal(model(x), base)
    attach(model, targets=("q", "attn.proj")).load(second.tensors())
    assert torch.equal(model(x), alone)


def test_strength_scales_the_change():
    model, x = nn.Sequential(nn.Linear(4, 5)).requires_grad_(False), torch.randn(3, 4)
    base = model(x)
    handle = attach(model, slots=2)
    handle.route(torch.tensor([0, 1, 1]))
    full = model(x)
    handle.scale(1, 0.25)
    torch.testing.assert_close(model(x)[0], full[0])
    torch.testing.assert_close((model(x) - base)[1:], 0.25 * (full - base)[1:])
    handle.scale(1, 0)
    assert torch.equal(model(x)[1:], base[1:])


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_merge_equals_attached_and_unmerges_exactly(x, targets):
    model = vit()
    base = deepcopy(model.state_dict())
    first, second = attach(model, slots=2, targets=targets), attach(model, targets="mlp")
    expected = model(x)
    first.merge()
    second.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    first.unmerge()  # the first in goes first: the other's change must survive
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    first.merge(slot=1)
    first.detach()
    second.unmerge()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())


def test_probe_passes_on_a_live_model_and_leaves_no_trace(x):
    model = vit()
    handle = LoRA(targets="all").attach(model)
    state = torch.get_rng_state()
    handle.probe(lambda: model(x[:1]))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in handle.bank.parameters())


def test_probe_names_the_sites_that_nobody_calls(x):
    beit = vit("beit_base_patch16_224", depth=1)  # reads qkv.weight without calling the module
    handle = LoRA(targets=("attn.qkv", "attn.proj")).attach(beit)
    with pytest.raises(SiteError, match=r"blocks\.0\.attn\.qkv: 1 of 2 sites .*weight_mode"):
        handle.probe(lambda: beit(x[:1]))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"])
def test_a_projection_that_is_never_called_is_found_and_reached_in_weight_mode(name):
    """Here an adapter of peft gets no gradient, and no word is said."""
    torch.manual_seed(0)
    small = {"embed_dim": 16, "num_classes": 3, "depth": 1, "num_heads": 2, "img_size": 28, "patch_size": 14}
    swin = {"embed_dim": 16, "num_classes": 3, "depths": (1,), "num_heads": (2,), "img_size": 32, "window_size": 4}
    model = timm.create_model(name, **(swin if name.startswith("swin") else small)).requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # Swin starts its at zero, which no gradient passes
            nn.init.ones_(module.weight)
    side = 32 if name.startswith("swin") else 28
    x = torch.randn(2, 3, side, side)
    keys, base = list(model.state_dict()), model(x)
    handle = LoRA(rank=2, targets=("attn.qkv", "attn.proj")).attach(model)
    with pytest.raises(SiteError, match=r"attn\.qkv: 1 of 2 sites .*weight_mode"):
        handle.probe(lambda: model(x))
    handle.detach()
    handle = LoRA(rank=2, targets=("attn.qkv", "attn.proj"), weight_mode=("attn.qkv",)).attach(model)
    assert torch.equal(model(x), base)
    handle.probe(lambda: model(x))
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("targets", ["attn.qkv", "q"])
def test_weight_mode_reaches_a_weight_that_is_read_directly(x, targets):
    beit = vit("beit_base_patch16_224", depth=1)
    keys, base = list(beit.state_dict()), beit(x)
    LoRA(targets=targets).attach(beit).detach()
    method = LoRA(rank=2, targets=(targets, "attn.proj"), weight_mode=("attn.qkv",))
    handle = method.attach(beit)
    assert torch.equal(beit(x), base)
    handle.probe(lambda: beit(x[:1]))
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    adapted = beit(x)
    assert list(beit.state_dict()) == keys
    handle.merge()
    torch.testing.assert_close(beit(x), adapted, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="weight mode"):
        handle.route(torch.zeros(4, dtype=torch.long))
    handle.detach()
    assert torch.equal(beit(x), base)


def test_an_unusual_attention_of_torch_is_refused_with_the_way_out():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)})
    x = torch.randn(2, 3, 8)
    with pytest.raises(SiteError, match=r"attn\.out_proj: .*MultiheadAttention reads its weight.*weight_mode"):
        LoRA(targets="out_proj").attach(model)
    LoRA(targets="out_proj", weight_mode=("out_proj",)).attach(model).probe(lambda: model["attn"](x, x, x)[0])


def test_slots_are_added_and_freed_without_touching_the_model(x):
    model = vit()
    handle = attach(model)
    alone, tensors = model(x), handle.tensors()
    numbers = [handle.add({name: k * tensor for name, tensor in tensors.items()}) for k in (0, 1, 2)]
    assert numbers == [1, 2, 3]
    handle.remove(2)
    assert handle.add(tensors) == 2
    handle.route(torch.tensor([0, 2, 1, -1]))
    mixed = model(x)
    torch.testing.assert_close(mixed[:2], alone[:2])
    handle.route(torch.full((4,), -1))
    torch.testing.assert_close(mixed[2:], model(x)[2:])
    with pytest.raises(FormatError, match="missing"):
        handle.add({})
    assert handle.add(tensors) == 4
    assert handle.slots == 8


def test_a_subclass_with_its_own_forward_keeps_it():
    class Doubling(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model, x = nn.Sequential(Doubling(4, 6)).requires_grad_(False), torch.randn(3, 4)
    base = model(x)
    handle = attach(model)
    torch.testing.assert_close(model(x), base + x @ handle._slots[0].delta(0).T)


def test_tensors_load_into_another_slot_and_smaller_ranks_are_padded(x):
    model = vit()
    small = attach(model, targets="attention")
    alone, tensors = model(x), small.tensors()
    small.detach()
    wide = LoRA(rank=6, alpha=24, targets="attention").attach(model, slots=2)
    wide.load(tensors, slot=1)
    wide.scale(1, 1.0)
    wide.route(torch.ones(4, dtype=torch.long))
    torch.testing.assert_close(model(x), alone)


def test_reset_depends_on_the_seed_alone():
    handle = LoRA(targets="attention").attach(vit(), slots=2)
    handle.reset(0, seed=5)
    torch.randn(7)
    handle.reset(1, seed=5)
    one, two = handle.tensors(0), handle.tensors(1)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_refusals_name_the_tensor_the_slot_and_the_batch(x):
    model = vit()
    handle = attach(model, slots=2, targets="attn.proj")
    tensors = handle.tensors()
    with pytest.raises(FormatError, match=r"blocks\.0\.attn\.proj\.A: missing"):
        handle.load({name: t for name, t in tensors.items() if name != "blocks.0.attn.proj.A"})
    with pytest.raises(
        FormatError, match=r"blocks\.0\.attn\.porj\.A: not part .*did you mean blocks\.0\.attn\.proj\.A"
    ):
        handle.load(tensors | {"blocks.0.attn.porj.A": torch.zeros(1)})
    with pytest.raises(FormatError, match=r"shape \(9, 16\) for \(2, 16\)"):
        handle.load(tensors | {"blocks.0.attn.proj.A": torch.zeros(9, 16)})
    with pytest.raises(InputError, match="from -1 to 1"):
        handle.route(torch.tensor([0, 2]))
    handle.route(torch.tensor([0, 1]))
    with pytest.raises(SiteError, match="route of 2 rows: blocks.0.attn.proj got a batch of 4"):
        model(x)


def test_a_plan_of_another_model_is_refused():
    plan = LoRA(targets="attention").plan(vit())
    with pytest.raises(SiteError, match=r"blocks\.1\.attn.*no such module"):
        LoRA().attach(vit(depth=1), plan=plan)
    with pytest.raises(SiteError, match=r"planned for a weight \(48, 16\), the model has \(96, 32\)"):
        LoRA().attach(vit(embed_dim=32), plan=plan)


def test_a_narrower_tensor_is_no_smaller_rank(x):
    handle = attach(vit(), targets="attn.proj")
    before, tensors = handle.tensors(), handle.tensors()
    narrow = tensors | {"blocks.1.attn.proj.A": torch.zeros(2, 8)}
    with pytest.raises(FormatError, match=r"blocks\.1\.attn\.proj\.A: shape \(2, 8\) for \(2, 16\)"):
        handle.load({name: torch.zeros_like(tensor) for name, tensor in tensors.items()} | narrow)
    assert all(torch.equal(handle.tensors()[name], tensor) for name, tensor in before.items())


def test_what_is_detached_stays_so(x):
    model = vit()
    base = model(x)
    handle = attach(model)
    handle.detach()
    handle.detach()
    with pytest.raises(SiteError, match="detached"):
        handle.merge()
    assert torch.equal(model(x), base)


def test_a_slot_that_cannot_be_made_leaves_the_model_alone():
    model = vit()
    good, bad = Site("blocks.0.attn.proj", "linear", (16, 16)), Site("norm", "norm", (16,))
    with pytest.raises(SiteError, match="norm: LoRA has nothing for sites of kind norm"):
        LoRA().attach(model, plan=Plan((good, bad)))
    assert type(model.blocks[0].attn.proj) is nn.Linear


def test_a_weight_that_two_modules_share_is_not_merged():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)).requires_grad_(False)
    model[1].weight = model[0].weight
    handle = LoRA(rank=2, targets="embedding").attach(model)
    with pytest.raises(SiteError, match="0: its weight is that of 1 too"):
        handle.merge()
    assert model[0].weight is model[1].weight


def test_the_two_hundredth_adapter_attaches_as_fast_as_the_second():
    """Stacks double: few additions copy what is there, a number once on average, and none makes modules."""
    model = vit(depth=1)
    handle = attach(model, targets="all-linear")
    tensors, stacks = handle.tensors(), list(handle.bank.parameters())
    modules = [len(list(root.modules())) for root in (model, handle.bank)]
    places, copied, seconds = [stack.data_ptr() for stack in stacks], 0, []
    for _ in range(2, 221):
        sizes, begun = [stack.numel() for stack in stacks], time.perf_counter()
        handle.add(tensors)
        seconds.append(time.perf_counter() - begun)
        now = [stack.data_ptr() for stack in stacks]
        moved = [size for size, a, b in zip(sizes, places, now, strict=True) if a != b]
        assert len(moved) in (0, len(stacks))
        copied, places = copied + sum(moved), now
    assert handle.slots == 256 and copied == 255 * sum(tensor.numel() for tensor in tensors.values())
    assert [len(list(root.modules())) for root in (model, handle.bank)] == modules
    first, last = sorted(seconds[:30])[14], sorted(seconds[-30:])[14]
    assert last < 4 * first, f"{1e3 * first:.2f} ms, then {1e3 * last:.2f} ms"


def test_strength_counts_when_merged_too(x):
    model = vit(depth=1)
    handle = attach(model)
    handle.scale(0, 0.5)
    expected = model(x)
    handle.scale(0, 1.0)
    handle.merge()
    handle.scale(0, 0.5)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_bypassed_names_the_sites_whose_module_is_not_called(x):
    beit = vit("beit_base_patch16_224", depth=1)
    handle = LoRA(targets=("attn.qkv", "attn.proj")).attach(beit)
    assert handle.bypassed(lambda: beit(x[:1])) == ["blocks.0.attn.qkv"]
    handle.detach()
    LoRA(targets=("attn.qkv", "attn.proj"), weight_mode=("attn.qkv",)).attach(beit)
    assert LoRA(targets="attn.proj").attach(beit).bypassed(lambda: beit(x[:1])) == []
