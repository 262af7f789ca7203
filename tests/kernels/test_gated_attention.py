"""Attention over groups of keys with gates: both paths against the formula in float64."""

from functools import partial

import pytest
import torch

from graft.kernels.gated_attention import Group, gated_attention, reference, supports

pytestmark = pytest.mark.usefixtures("poisoned")


def case(dtype=torch.float32, size=(2, 2, 37, 16), lengths=(20, 4), main=False, gate="head"):
    torch.manual_seed(0)
    b, h, n, d = size

    def draw(*shape):
        return torch.randn(*shape).to(dtype).requires_grad_()

    gates = {"head": lambda: torch.rand(h), "row": lambda: torch.rand(b, 1), "number": lambda: torch.tensor(0.7)}
    groups = tuple(Group(draw(b, h, m, d), draw(b, h, m, d), gates[gate]().requires_grad_()) for m in lengths)
    return draw(b, h, n, d), groups, draw(b, h, n, d) if main else None


def leaves(query, groups, main):
    return [query, *(tensor for group in groups for tensor in group), *([] if main is None else [main])]


def results(call, inputs, upstream):
    y = call(*inputs)
    return [y, *torch.autograd.grad(y, leaves(*inputs), upstream)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lengths": (10,), "main": True, "dtype": torch.float16},
        {"size": (1, 3, 70, 40), "lengths": (1, 70), "gate": "number"},
        {"size": (3, 1, 1, 5), "lengths": (130,), "main": True, "gate": "row"},
        {"size": (1, 2, 65, 64), "lengths": (64, 4), "main": True, "dtype": torch.float16},
    ],
    ids=str,
)
def test_no_worse_than_the_library_path(options, no_worse, exact):
    pytest.importorskip("triton")
    inputs = case(**options)
    assert not supports(*inputs)
    upstream = torch.randn(inputs[0].shape).to(inputs[0].dtype)
    no_worse(
        results(partial(gated_attention, path="triton"), inputs, upstream),
        results(partial(gated_attention, path="library"), inputs, upstream),
        results(reference, tuple(map(exact, inputs)), upstream.double()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("main", [False, True])
def test_the_library_path_is_no_worse_than_plain_torch(dtype, main, no_worse, exact, eager):
    inputs = case(dtype, (2, 64, 9, 8), main=main)  # heads enough for the rounding of their gates to level out
    upstream = torch.randn(inputs[0].shape).to(dtype)
    no_worse(
        results(partial(gated_attention, path="library"), inputs, upstream),
        results(lambda *given: reference(*eager(given, dtype)), inputs, upstream),
        results(reference, tuple(map(exact, inputs)), upstream.double()),
    )


@pytest.mark.parametrize("main", [False, True])
def test_the_library_path_is_the_formula(main):
    query, groups, whole = case(torch.float64, (1, 2, 3, 4), (3, 1, 2), main)
    groups = tuple(Group(*(part.detach().double().requires_grad_() for part in group)) for group in groups)
    torch.testing.assert_close(gated_attention(query, groups, whole), reference(query, groups, whole))
    tensors = leaves(query, groups, whole)

    def call(*tensors):
        return gated_attention(tensors[0], tuple(Group(*tensors[k : k + 3]) for k in (1, 4, 7)), *tensors[10:])

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("path", ["library", "triton"])
def test_a_closed_gate_changes_no_bit_and_still_learns(path):
    if path == "triton":
        pytest.importorskip("triton")
    query, (group,), main = case(lengths=(4,), main=True)
    gate = torch.zeros(2, requires_grad=True)
    y = gated_attention(query, (group._replace(gate=torch.tanh(gate)),), main, path)
    assert torch.equal(y, main)
    y.square().sum().backward()
    assert gate.grad is not None
    assert gate.grad.count_nonzero() == 2
    assert not group.key.grad.any()


def test_the_same_bits_every_time():
    pytest.importorskip("triton")
    inputs = case(size=(1, 1, 150, 16), dtype=torch.float16)
    upstream = torch.randn(1, 1, 150, 16).half()
    first, second = (results(partial(gated_attention, path="triton"), inputs, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_view_and_a_gate_of_one_are_served():
    query, (group, _), _ = case()
    turned = query.detach().mT.contiguous().mT
    plain = (group._replace(gate=None),)
    expected = gated_attention(query, plain, path="library")
    torch.testing.assert_close(gated_attention(turned, plain, path="library"), expected)
    pytest.importorskip("triton")
    torch.testing.assert_close(gated_attention(turned, plain, path="triton"), expected)


def test_the_operator_is_what_torch_expects():
    pytest.importorskip("triton")
    from graft.kernels.gated_attention_triton import fused, fused_backward

    query, groups, main = case(size=(1, 2, 3, 8), lengths=(2, 3), main=True)
    keys, values, gates = ([group[k].detach() for group in groups] for k in range(3))
    gates = [gate.expand(1, 2).contiguous() for gate in gates]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused, (query, main, keys, values, gates), test_utils=tests)
    torch.library.opcheck(fused_backward, (main.detach(), query.detach(), keys, values, gates), test_utils=tests)


def test_it_compiles_as_one_graph():
    pytest.importorskip("triton")
    query, groups, main = case(size=(1, 2, 3, 8), main=True)

    def step(query):
        return gated_attention(query, groups, main, "triton").sin()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(*(torch.autograd.grad(call(query).sum(), query) for call in (compiled, step)))


def test_what_it_cannot_do_is_said():
    query, groups, _ = case(lengths=(3, 600))
    assert supports(query, groups) == ["600 keys, of 1 to 512"]
    assert supports(query, groups[:1] * 3) == ["3 groups, of at most 2"]
    other = groups[0]._replace(value=groups[0].value.half())
    assert supports(query, (other,)) == ["keys of torch.float32, values of torch.float16 for queries of torch.float32"]
