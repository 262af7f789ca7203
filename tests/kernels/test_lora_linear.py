from itertools import product

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from graft.kernels.lora_linear import Term, _masks, lora_linear, reference

ROUTES = {"one": None, "mixed": torch.tensor([0, 2, -1, 1])}
ROWS = {"all": None, "packed": (3, 9)}


def case(route=None, rows=None, dtype=torch.float64, dropout=0.0, k=3):
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(12, 6, dtype=dtype), torch.randn(12, dtype=dtype)
    factors = torch.float32 if dtype == torch.bfloat16 else dtype
    down = torch.randn(k, 2, 6, dtype=factors, requires_grad=True)
    up = torch.randn(k, 12 if rows is None else rows[1] - rows[0], 2, dtype=factors, requires_grad=True)
    return x, weight, bias, Term(down, up, torch.rand(k, dtype=factors), route, rows, dropout, seed=7)


@pytest.mark.parametrize(("route", "rows"), [*product(ROUTES, ROWS)])
def test_values_and_gradients_are_those_of_the_formula(route, rows):
    x, weight, bias, term = case(ROUTES[route], ROWS[rows])
    terms = (term, term._replace(route=None))
    ours, expected = lora_linear(x, weight, bias, terms), reference(x, weight, bias, terms)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(ours)
    wanted = (x, term.down, term.up)
    for a, b in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("route", "rows"), [*product(ROUTES, ROWS)])
def test_a_gain_scales_the_product_and_not_the_bias(route, rows):
    x, weight, bias, term = case(ROUTES[route], ROWS[rows])
    term = term._replace(gain=torch.rand(3, term.up.shape[1], dtype=x.dtype, requires_grad=True))
    ours, expected = lora_linear(x, weight, bias, (term,)), reference(x, weight, bias, (term,))
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(ours)
    wanted = (x, term.down, term.up, term.gain)
    for a, b in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)
    one = term._replace(gain=torch.ones_like(term.gain), up=torch.zeros_like(term.up))
    assert torch.equal(lora_linear(x, weight, bias, (one,)), F.linear(x, weight, bias))


@pytest.mark.parametrize("rows", [None, (3, 1003)])
def test_a_gain_on_a_wide_input_keeps_part_of_its_product(rows):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 384, requires_grad=True), torch.randn(1024, 384), torch.randn(1024)
    out = 1024 if rows is None else 1000
    down, up = torch.randn(1, 2, 384, requires_grad=True), torch.randn(1, out, 2, requires_grad=True)
    gain = torch.rand(1, out, requires_grad=True)
    term = Term(down, up, torch.ones(1), rows=rows, gain=gain)
    for b in (bias, None):
        ours, expected = lora_linear(x, weight, b, (term,)), reference(x, weight, b, (term,))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
        wanted, upstream = (x, down, up, gain), torch.randn_like(ours)
        for mine, other in zip(
            torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("route", [[0, 1, 2, 0], [2, 2, 1, -1], [-1, -1, -1, -1], [1, 1, 1, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("rows", ROWS)
def test_few_tokens_a_row_are_sorted_by_slot_in_inference(rows, route):
    x, weight, bias, term = case(torch.tensor(route), ROWS[rows])
    x = x[:, :2]
    ours, expected = lora_linear(x, weight, bias, (term,)), reference(x, weight, bias, (term,))
    with torch.no_grad():
        torch.testing.assert_close(lora_linear(x, weight, bias, (term,)), expected)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("route", "rows"), [*product(ROUTES, ROWS)])
def test_gradients_with_dropout_see_the_mask_of_the_forward(route, rows):
    x, weight, bias, term = case(ROUTES[route], ROWS[rows], dropout=0.3)

    def run(x, down, up):
        return lora_linear(x, weight, bias, (term._replace(down=down, up=up),))

    assert torch.autograd.gradcheck(run, (x, term.down, term.up))


def test_a_transposed_input_and_an_expanded_gradient_are_served():
    x, weight, bias, term = case(ROUTES["mixed"], ROWS["packed"])
    turned = x.detach().mT.contiguous().mT.requires_grad_()
    torch.testing.assert_close(lora_linear(turned, weight, bias, (term,)), reference(x, weight, bias, (term,)))
    ours = torch.autograd.grad(lora_linear(turned, weight, bias, (term,)).sum(), turned)
    expected = torch.autograd.grad(reference(x, weight, bias, (term,)).sum(), x)
    torch.testing.assert_close(ours, expected)


def test_without_a_base_the_terms_stand_alone():
    x, weight, bias, term = case()
    alone = lora_linear(x, None, None, (term,))
    torch.testing.assert_close(alone, reference(x, weight, bias, (term,)) - F.linear(x, weight, bias))
    assert torch.autograd.gradcheck(lambda x: lora_linear(x, None, None, (term,)), (x,))


def test_an_unfrozen_base_gets_its_gradient_too():
    x, weight, bias, term = case()
    weight.requires_grad_()
    bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda w, b: lora_linear(x, w, b, (term,)), (weight, bias))


@pytest.mark.parametrize("grouped", [False, True])
def test_dropout_drops_the_fraction_it_says_and_keeps_the_mean(grouped):
    x = torch.ones(4, 2000, 100)  # several chunks of the mask
    eye = torch.eye(100)[None]
    route = torch.zeros(4, dtype=torch.long) if grouped else None
    term = Term(eye, eye, torch.ones(1), route, dropout=0.1, seed=3)
    y = lora_linear(x, None, None, (term,))
    assert (y == 0).float().mean().item() == pytest.approx(26 / 256, abs=2e-3)
    assert y.mean().item() == pytest.approx(1, abs=2e-3)
    assert torch.equal(y, lora_linear(x, None, None, (term,)))
    assert not torch.equal(y, lora_linear(x, None, None, (term._replace(seed=4),)))


def test_only_the_input_and_rank_sized_tensors_are_kept():
    torch.manual_seed(0)
    x = torch.randn(8, 50, 64, requires_grad=True)
    weight, rank = torch.randn(256, 64), 2
    down, up = torch.randn(1, rank, 64, requires_grad=True), torch.randn(1, 256, rank, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = lora_linear(x, weight, None, (Term(down, up, torch.ones(1), dropout=0.1),))
    for known in (x, weight, down, up):
        del kept[known.untyped_storage().data_ptr()]
    assert sum(storage.nbytes() for storage in kept.values()) <= 4 * (8 * 50 * rank) + 16
    assert y.requires_grad


def test_an_input_without_gradient_costs_none():
    x, weight, bias, term = case()

    def flops(x):
        with FlopCounterMode(display=False) as counter:
            lora_linear(x, weight, bias, (term,)).sum().backward()
        return counter.get_total_flops()

    assert flops(x) - flops(x.detach()) >= 2 * 20 * 12 * 6  # the base's product; the counter misses in-place ones


def test_factors_are_cast_to_the_activations_and_their_gradients_stay_float32():
    x, weight, bias, term = case(dtype=torch.bfloat16)
    y = lora_linear(x, weight, bias, (term,))
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert term.down.grad.dtype == term.up.grad.dtype == torch.float32
    wide = lora_linear(x.float(), weight.float(), bias.float(), (term,))
    torch.testing.assert_close(y.float(), wide, rtol=0.05, atol=0.2)


def test_autocast_computes_as_a_linear_layer_would():
    x, weight, bias, term = case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, weight, bias, (term,))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == term.down.grad.dtype == torch.float32


def test_masks_drawn_at_the_same_time_do_not_mix():
    """As when two threads train at once: each mask follows its own seed."""
    like = torch.empty(0)
    shape = (1, 3000, 100)  # several chunks
    alone = [[mask for _, mask in _masks(shape, 0.5, seed, like)] for seed in (1, 2)]
    together = zip(*(_masks(shape, 0.5, seed, like) for seed in (1, 2)), strict=True)
    for (a, b), ((_, c), (_, d)) in zip(zip(*alone, strict=True), together, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(4, 0, 6), (0, 5, 6), (0, 6)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_batch_of_nothing_has_gradients_of_zero(dropout, shape, rows):
    route = torch.tensor([0, 2, -1, 1])[: shape[0]]
    _, weight, bias, term = case(route, ROWS[rows], torch.float32, dropout)
    x = torch.zeros(shape, requires_grad=True)
    term = term._replace(gain=torch.rand(3, term.up.shape[1], requires_grad=True))
    for terms in ((term,), (term._replace(route=None, gain=None),)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                y = lora_linear(x, weight, bias, terms)
            assert y.shape == (*shape[:-1], 12)
            if grad:
                found = torch.autograd.grad(y.sum(), (x, term.down, term.up))
                assert found[0].shape == shape and not any(part.any() for part in found)
