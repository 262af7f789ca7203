"""Votes by class: both paths against the paper's product with one-hot labels in float64."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from graft.kernels.class_votes import by_class, class_sums, class_votes, reference, supports

pytestmark = pytest.mark.usefixtures("poisoned")


def case(dtype=torch.float32, m=70, width=40, sizes=(3, 0, 5, 1), grad=True):
    torch.manual_seed(0)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels))]
    draw = (F.normalize(torch.randn(count, width), dim=-1).to(dtype) for count in (m, len(labels)))
    features, keys = (each.requires_grad_(grad) for each in draw)
    return features, keys, by_class(labels, len(sizes)), 5.5


def results(call, features, keys, classes, beta, upstream):
    y = call(features, keys, classes, beta)
    return [y, *torch.autograd.grad(y, (features, keys), upstream)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float16, "m": 1, "sizes": (16,) * 9},
        {"dtype": torch.float16, "width": 64, "sizes": (1, 1, 1)},
        {"sizes": (100, 3)},
    ],
    ids=str,
)
def test_no_worse_than_the_library_path(options, no_worse, exact):
    pytest.importorskip("triton")
    features, keys, classes, beta = case(**options)
    assert not supports(features, keys, classes)
    upstream = torch.randn(len(features), classes.number)
    no_worse(
        results(partial(class_votes, path="triton"), features, keys, classes, beta, upstream),
        results(partial(class_votes, path="library"), features, keys, classes, beta, upstream),
        results(reference, exact(features), exact(keys), classes, beta, upstream.double()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_library_path_is_no_worse_than_plain_torch(dtype, no_worse, exact):
    features, keys, classes, beta = case(dtype)
    upstream = torch.randn(len(features), classes.number)

    def plain(*given):
        return reference(*given).float()

    no_worse(
        results(partial(class_votes, path="library"), features, keys, classes, beta, upstream),
        results(plain, features, keys, classes, beta, upstream),
        results(reference, exact(features), exact(keys), classes, beta, upstream.double()),
    )


def test_the_library_path_is_the_formula():
    features, keys, classes, beta = case(torch.float64, 3, 4, (2, 0, 1))
    torch.testing.assert_close(class_votes(features, keys, classes, beta), reference(features, keys, classes, beta))
    assert torch.autograd.gradcheck(lambda f, k: class_votes(f, k, classes, beta), (features, keys))


def test_cosines_that_are_kept_serve_every_beta():
    features, keys, classes, _ = case()
    near = keys @ features.T
    for beta in (0.5, 20.0):
        expected = reference(features, keys, classes, beta)
        torch.testing.assert_close(class_sums(near, classes, beta).T, expected)
        torch.testing.assert_close(class_sums(near.detach(), classes, beta, torch.empty_like(near)).T, expected)


def test_the_same_bits_every_time_and_a_class_without_keys_gets_nothing():
    pytest.importorskip("triton")
    features, keys, classes, beta = case()
    first, second = (class_votes(features, keys, classes, beta, "triton") for _ in range(2))
    assert torch.equal(first, second)
    assert not first[:, 1].any()


def test_the_operator_is_what_torch_expects():
    pytest.importorskip("triton")
    from graft.kernels.class_votes_triton import fused

    features, keys, classes, beta = case(m=3, width=8)
    given = (features, keys, classes.labels, classes.order, classes.starts, beta, classes.number, classes.widest)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused, given, test_utils=tests)


def test_what_it_cannot_do_is_said():
    features, keys, classes, _ = case(sizes=(129, 1))
    assert supports(features.half(), keys, classes) == [
        "keys of torch.float32 for features of torch.float16",
        "129 keys in a class, of at most 128",
    ]
