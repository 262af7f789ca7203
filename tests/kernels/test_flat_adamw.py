"""AdamW on a flat buffer beside one torch optimiser for each adapter."""

import pytest
import torch

from graft.kernels.flat_adamw import Settings, layout, reference, state, step, supports

pytestmark = pytest.mark.usefixtures("poisoned")

PIECES = [(1500, 0), (1500, 1), (7, 0), (7, 1), (40, 3)]  # adapter 2 has nothing
RATES, DECAYS, LIMITS = [0.1, 0.02, 1.0, 0.3], [0.0, 0.1, 0.0, 0.5], [1.0, float("inf"), 1.0, 0.05]


def case():
    torch.manual_seed(0)
    start = torch.randn(sum(size for size, _ in PIECES))
    slopes = torch.randn(3, len(start)) * torch.tensor([1.0, 1e-3, 10.0])[:, None]
    return start, slopes, layout(PIECES), Settings(*map(torch.tensor, (RATES, DECAYS, LIMITS)))


def taken(path, steps=3):
    parameters, slopes, where, settings = case()
    past = state(parameters, settings)
    assert not supports(parameters, slopes[0], past, where, settings)
    for slope in slopes[:steps]:
        step(parameters, slope.clone(), past, where, settings, path=path)
    return [parameters, past.first, past.second]


def apart(dtype):
    """Each adapter with its own optimiser."""
    start, slopes, where, _ = case()
    result = start.to(dtype)
    for owner, (rate, decay, limit) in enumerate(zip(RATES, DECAYS, LIMITS, strict=True)):
        pieces = [torch.nn.Parameter(result[a:b].clone()) for a, b, other in where.pieces if other == owner]
        if not pieces:
            continue
        optimizer = torch.optim.AdamW(pieces, lr=rate, weight_decay=decay)
        for slope in slopes.to(dtype):
            for parameter, (a, b, _) in zip(pieces, [p for p in where.pieces if p[2] == owner], strict=True):
                parameter.grad = slope[a:b].clone()
            torch.nn.utils.clip_grad_norm_(pieces, limit)
            optimizer.step()
        for parameter, (a, b, _) in zip(pieces, [p for p in where.pieces if p[2] == owner], strict=True):
            result[a:b] = parameter.detach()
    return result


@pytest.mark.parametrize("path", ["library", "triton"])
def test_each_adapter_moves_as_with_its_own_optimiser(path, no_worse):
    if path == "triton":
        pytest.importorskip("triton")
    no_worse(taken(path)[:1], [apart(torch.float32)], [apart(torch.float64)])


def test_the_formula_is_the_optimiser_s(exact):
    parameters, slopes, where, settings = case()
    wide = exact((parameters, slopes[0], state(parameters, settings), where, settings))
    moved = parameters.clone()
    step(moved, slopes[0], state(parameters, settings), where, settings)
    torch.testing.assert_close(reference(*wide).float(), moved)


def test_both_paths_keep_the_same_state():
    pytest.importorskip("triton")
    for a, b in zip(taken("triton"), taken("library"), strict=True):
        torch.testing.assert_close(a, b)


def test_the_same_bits_every_time():
    pytest.importorskip("triton")
    assert all(torch.equal(a, b) for a, b in zip(taken("triton"), taken("triton"), strict=True))


def test_an_adapter_without_parameters_takes_no_step():
    for path in ["library", "triton"] if pytest.importorskip("triton") else ["library"]:
        parameters, slopes, where, settings = case()
        past = state(parameters, settings)
        step(parameters, slopes[0], past, where, settings, path=path)
        assert past.steps.tolist() == [1, 1, 0, 1]


def test_the_operator_is_what_torch_expects():
    pytest.importorskip("triton")
    from graft.kernels.flat_adamw_triton import fused

    parameters, slopes, where, settings = case()
    past = state(parameters, settings)
    given = (parameters, slopes[0], *past, where.blocks, where.firsts, *settings, 0.9, 0.999, 1e-8)
    torch.library.opcheck(fused, given, test_utils=("test_schema", "test_faketensor"))


def test_what_it_cannot_do_is_said():
    parameters, slopes, where, settings = case()
    past = state(parameters.double(), settings)
    assert supports(parameters, slopes[0], past, where, settings) == [
        "parameters, state or settings that are not float32"
    ]
    gaps = torch.stack([slopes[0], slopes[1]], 1)[:, 0]
    assert supports(parameters, gaps, state(parameters, settings), where, settings) == ["a buffer with gaps"]
