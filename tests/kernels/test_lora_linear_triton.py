"""The Triton path of the LoRA linear layer, interpreted, against the formula in float64."""

import pytest
import torch
from torch.nn import functional as F

from graft.kernels.lora_linear import Term, bands, choose, lora_linear, paths, reference, supports

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned")

MIXED = torch.tensor([2, -1, 0])
THIRDS = ((0, 20), (40, 60))


def case(dtype=torch.float32, route=None, rows=(None,), rank=5, shape=(3, 37, 70, 60), slots=3):
    torch.manual_seed(0)
    b, n, i, o = shape
    x = torch.randn(b, n, i, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(o, i, dtype=dtype) / i**0.5, torch.randn(o, dtype=dtype)
    terms = []
    for band in rows:
        width = o if band is None else band[1] - band[0]
        down, up = torch.randn(slots, rank, i, requires_grad=True), torch.randn(slots, width, rank, requires_grad=True)
        terms.append(Term(down, up, torch.rand(slots), route, band))
    return x, weight, bias, tuple(terms)


def results(call, x, terms, upstream):
    y = call()
    return [y, *torch.autograd.grad(y, (x, *(f for term in terms for f in (term.down, term.up))), upstream)]


@pytest.mark.parametrize("mode", ["split 2", "inline 2"])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 1},
        {"rank": 5, "dtype": torch.float16, "mixed": True},
        {"rank": 96, "dtype": torch.float16},
        {"rank": 5, "mixed": True, "rows": THIRDS},
        {"rank": 5, "dtype": torch.float16, "rows": THIRDS},
        {"rank": 16, "shape": (1, 1, 33, 7)},
        {"rank": 16, "mixed": True, "shape": (3, 65, 64, 64)},  # whole tiles
        {"rank": 5, "mixed": True, "slots": 9},  # more slots than rows: only the chosen ones are packed
    ],
    ids=str,
)
def test_no_worse_than_the_library_path(mode, options, no_worse, exact):
    mixed = options.get("mixed")
    x, weight, bias, terms = case(
        **{name: value for name, value in options.items() if name != "mixed"}, route=MIXED if mixed else None
    )
    assert not supports(x, weight, bias, terms)
    upstream = torch.randn(*x.shape[:-1], len(weight)).to(x.dtype)
    wide, wide_terms = exact(x), exact(terms)
    expected = reference(wide, weight.double(), bias.double(), wide_terms)
    wanted = (wide, *(f for term in wide_terms for f in (term.down, term.up)))
    no_worse(
        results(lambda: lora_linear(x, weight, bias, terms, mode), x, terms, upstream),
        results(lambda: lora_linear(x, weight, bias, terms, "library"), x, terms, upstream),
        [expected, *torch.autograd.grad(expected, wanted, upstream.double())],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"rank": 1}, {"rank": 96, "route": MIXED}, {"route": MIXED, "rows": THIRDS, "shape": (3, 17, 33, 60)}],
    ids=["rank 1", "rank 96, mixed", "bands, mixed"],
)
def test_the_library_path_is_no_worse_than_plain_torch(dtype, options, no_worse, exact, eager):
    x, weight, bias, terms = case(dtype, **options)
    upstream = torch.randn(*x.shape[:-1], len(weight)).to(dtype)
    wide, wide_terms = exact(x), exact(terms)
    no_worse(
        results(lambda: lora_linear(x, weight, bias, terms, "library"), x, terms, upstream),
        results(lambda: reference(x, weight, bias, eager(terms, dtype)), x, terms, upstream),
        results(
            lambda: reference(wide, weight.double(), bias.double(), wide_terms), wide, wide_terms, upstream.double()
        ),
    )


@pytest.mark.parametrize("mode", ["split 2", "inline 2"])
def test_rows_and_slots_without_each_other(mode):
    x, weight, bias, (term,) = case(route=MIXED)
    with torch.no_grad():
        term.down[1] = torch.nan  # no row chose slot 1
    y = lora_linear(x, weight, bias, (term,), mode)
    torch.testing.assert_close(y[1], F.linear(x[1], weight, bias))
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    for factor in (term.down, term.up):
        assert not factor.grad[1].any()
        assert factor.grad[0].any()


def test_the_same_bits_every_time():
    x, weight, bias, terms = case(torch.float16, MIXED, THIRDS)
    upstream = torch.randn(3, 37, 60).half()
    first, second = (
        results(lambda: lora_linear(x, weight, bias, terms, "inline 2"), x, terms, upstream) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradients_for_the_input_or_the_factors():
    x, weight, bias, (term,) = case(route=MIXED)
    whole = results(lambda: lora_linear(x, weight, bias, (term,), "inline 2"), x, (term,), torch.ones(3, 37, 60))
    y = lora_linear(x.detach(), weight, bias, (term,), "inline 2")
    (alone,) = torch.autograd.grad(y.sum(), term.down)
    torch.testing.assert_close(alone, whole[2], rtol=1e-4, atol=1e-4)
    still = term._replace(down=term.down.detach(), up=term.up.detach())
    (alone,) = torch.autograd.grad(lora_linear(x, weight, bias, (still,), "inline 2").sum(), x)
    torch.testing.assert_close(alone, whole[1], rtol=1e-4, atol=1e-4)


def test_the_operator_is_what_torch_expects():
    from graft.kernels.lora_linear_triton import fused, fused_backward

    x, weight, bias, (term,) = case(route=MIXED, shape=(3, 4, 8, 6))
    scale = term.scale[None]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused, (x, weight, bias, term.down, term.up, scale, MIXED, 5), test_utils=tests)
    inputs = (x.detach()[..., :6].contiguous(), weight, term.down.detach(), term.up.detach(), scale, MIXED, 5)
    torch.library.opcheck(fused_backward, inputs, test_utils=tests)


def test_it_compiles_as_one_graph():
    x, weight, bias, terms = case(route=MIXED, shape=(3, 4, 8, 6))

    def step(x):
        return lora_linear(x, weight, bias, terms, "inline 2").sin()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    torch.testing.assert_close(*(torch.autograd.grad(call(x).sum(), x) for call in (compiled, step)))


def test_what_it_cannot_do_is_said():
    x, weight, bias, terms = case()
    (term,) = terms
    assert supports(x, None, None, terms) == ["no dense base weight"]
    assert supports(x, weight, bias, (term._replace(dropout=0.1),)) == ["dropout"]
    assert supports(x, weight.clone().requires_grad_(), bias, terms) == ["the base is trained"]
    assert supports(x.double(), weight.double(), bias.double(), terms) == [
        "torch.float64 is not float16, bfloat16 or float32"
    ]
    assert supports(x, weight, bias, (term, term)) == ["terms on overlapping or unequal rows"]
    assert supports(*case(rank=129)) == ["rank 129 above 128", "float32 above rank 32"]
    assert supports(*case(torch.float16, rows=THIRDS, rank=65)) == ["several bands above rank 64"]


def test_a_large_input_has_more_paths_than_a_small_one():
    assert paths(torch.empty(2, 8, 16), 64, 4, 1) == ["library", "split 2", "inline 2"]
    assert len(paths(torch.empty(2, 64, 16, dtype=torch.float16), 512, 4, 1)) == 5


def test_on_the_cpu_the_library_path_is_taken():
    assert choose(*case()) == "library"


def test_features_fall_into_few_equal_bands():
    *_, (term,) = case()
    assert bands((term,), 60) == 1
    assert bands((term._replace(rows=(20, 40)),), 60) == 3
    assert bands(tuple(term._replace(rows=rows) for rows in THIRDS), 60) == 3
    for rows in [((0, 20), (20, 30)), ((10, 30),), ((0, 20), (0, 20)), ((0, 10),)]:
        assert bands(tuple(term._replace(rows=each) for each in rows), 60) == 0


def test_what_it_can_do_is_asked_within_compiled_code_too():
    x, weight, bias, terms = case(route=MIXED, shape=(3, 4, 8, 6))

    def step(x):
        return x if supports(x, weight, bias, terms) else lora_linear(x, weight, bias, terms, "inline 2")

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
