"""The bottleneck adapter: both paths against the formula in float64."""

from functools import partial
from typing import Any

import pytest
import torch

from graft.kernels.bottleneck import Layers, Norm, bottleneck, reference, supports

pytestmark = pytest.mark.usefixtures("poisoned")

MIXED = torch.tensor([2, -1, 0])


def case(dtype=torch.float16, size=(3, 37, 40, 40), inside=5, activation="gelu", norm=False, onto=None, mixed=True):
    torch.manual_seed(0)
    b, n, i, o = size
    x = (torch.randn(b, n, i) + (2 if norm else 0)).to(dtype).requires_grad_()
    down, up = torch.randn(3, inside, i) / i**0.5, torch.randn(3, o, inside) / inside**0.5
    stacks = [stack.requires_grad_() for stack in (down, torch.randn(3, inside), up, torch.randn(3, o))]
    route = MIXED if mixed else None
    layers = Layers(stacks[0], stacks[1], stacks[2], stacks[3], torch.rand(3), route)
    affine = Norm(torch.randn(i).to(dtype), torch.randn(i).to(dtype)) if norm else None
    other = torch.randn(b, n, o).to(dtype).requires_grad_() if onto == "other" else None
    return x, layers, activation, affine, x if onto == "x" else other


def results(call, upstream, x, layers, activation, norm, onto):
    y = call(x, layers, activation, norm, onto)
    wanted = [x, *layers[:4], *([] if onto is None or onto is x else [onto])]
    return [y, *torch.autograd.grad(y, wanted, upstream)]


@pytest.mark.parametrize(
    "options",
    [
        {"onto": "x"},
        {"norm": True, "onto": "other"},
        {"norm": True, "onto": "x", "activation": "silu", "mixed": False},
        {"size": (3, 1, 33, 70), "inside": 1, "activation": "relu", "dtype": torch.float32},
        {"size": (3, 70, 64, 16), "inside": 96, "mixed": False},
    ],
    ids=str,
)
def test_no_worse_than_the_library_path(options, no_worse, exact):
    pytest.importorskip("triton")
    x, layers, activation, norm, onto = case(**options)
    assert not supports(x, layers, norm, onto)
    out = layers.up.shape[1]
    upstream = torch.randn(*x.shape[:-1], out).to(x.dtype)
    wide, wide_layers = exact(x), exact(tuple(layers))
    given = (wide, Layers(*wide_layers), activation, exact(norm), wide if onto is x else exact(onto))
    no_worse(
        results(partial(bottleneck, path="triton"), upstream, x, layers, activation, norm, onto),
        results(partial(bottleneck, path="library"), upstream, x, layers, activation, norm, onto),
        results(reference, upstream.double(), *given),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_the_library_path_is_no_worse_than_plain_torch(dtype, norm, no_worse, exact, eager):
    x, layers, *others = case(dtype, norm=norm, onto="other")
    upstream = torch.randn(*x.shape[:-1], layers.up.shape[1]).to(dtype)

    def plain(x, layers, *others):
        return reference(x, eager(layers, dtype), *others)

    no_worse(
        results(partial(bottleneck, path="library"), upstream, x, layers, *others),
        results(plain, upstream, x, layers, *others),
        results(reference, upstream.double(), exact(x), Layers(*exact(tuple(layers))), *map(exact, others)),
    )


@pytest.mark.parametrize("onto", [None, "x"])
@pytest.mark.parametrize("norm", [False, True])
def test_the_library_path_is_the_formula(norm, onto, exact):
    x, layers, activation, affine, added = case(size=(3, 2, 4, 4), inside=2, norm=norm, onto=onto)
    x, layers, affine = exact(x), Layers(*exact(tuple(layers))), exact(affine)

    def call(x, *stacks):
        given = layers._replace(**dict(zip(layers._fields[:4], stacks, strict=True)))
        return bottleneck(x, given, activation, affine, x if onto else None)

    expected = reference(x, layers, activation, affine, x if onto else None)
    torch.testing.assert_close(call(x, *layers[:4]), expected)
    assert torch.autograd.gradcheck(call, (x, *layers[:4]))


@pytest.mark.parametrize("path", ["library", "triton"])
def test_rows_and_slots_without_each_other(path):
    if path == "triton":
        pytest.importorskip("triton")
    x, layers, activation, _, _ = case(torch.float32)
    y = bottleneck(x, layers, activation, onto=x, path=path)
    assert torch.equal(y[1], x[1])
    y.sum().backward()
    for stack in layers[:4]:
        assert not stack.grad[1].any()
        assert stack.grad[0].any()


@pytest.mark.parametrize("shape", [(3, 0, 40), (0, 5, 40), (0, 40)], ids=str)
def test_a_batch_of_nothing_has_gradients_of_zero(shape):
    _, layers, *_ = case()
    x = torch.zeros(shape, requires_grad=True)
    for route in (None, MIXED[: shape[0]]):
        y = bottleneck(x, layers._replace(route=route), onto=x)
        assert y.shape == shape
        assert not any(part.any() for part in torch.autograd.grad(y.sum(), (x, *layers[:4])))


def test_the_same_bits_every_time():
    pytest.importorskip("triton")
    given: tuple[Any, ...] = case(norm=True, onto="x")
    upstream = torch.randn(3, 37, 40).half()
    first, second = (results(partial(bottleneck, path="triton"), upstream, *given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_operator_is_what_torch_expects():
    pytest.importorskip("triton")
    from graft.kernels.bottleneck_triton import fused, fused_backward

    x, layers, _, norm, _ = case(size=(3, 2, 8, 6), norm=True)
    down, start, up, end, scale, route = layers
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = (x, None, down, start, up, end, scale, route, *norm, 1, False)
    torch.library.opcheck(fused, given, test_utils=tests)
    plain = [stack.detach() for stack in (down, start, up)]
    given = (x.detach()[..., :6].contiguous(), x.detach(), *plain, scale, route, *norm, 1, False)
    torch.library.opcheck(fused_backward, given, test_utils=tests)


def test_it_compiles_as_one_graph():
    pytest.importorskip("triton")
    x, layers, activation, norm, _ = case(size=(3, 2, 8, 8), norm=True)

    def step(x):
        return bottleneck(x, layers, activation, norm, x, "triton").sin()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(*(torch.autograd.grad(call(x).sum(), x) for call in (compiled, step)))


def test_under_autocast_what_it_adds_to_keeps_its_type():
    x, layers, activation, _, _ = case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bottleneck(x, layers, activation).dtype == torch.bfloat16
        assert bottleneck(x, layers, activation, onto=x).dtype == torch.float32


def test_what_it_cannot_do_is_said():
    x, layers, _, norm, _ = case(inside=129, norm=True)
    assert supports(x, layers) == ["inside of 129 above 128"]
    trained = Norm(norm.weight.requires_grad_(), norm.bias)
    assert supports(x, layers, trained)[1:] == ["the norm is trained"]
    assert supports(x, layers, None, x.float())[1:] == ["adds torch.float16 onto torch.float32"]
    x, layers, _, norm, _ = case(torch.float32, inside=33, norm=True)
    assert supports(x, layers, norm) == ["float32 above an inside of 32", "a norm in float32"]
