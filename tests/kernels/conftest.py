"""How kernels are judged: against the formula in float64, beside torch's own operations in the same type."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote to is NaN."""
    torch.use_deterministic_algorithms(True)  # without it the filling is off
    assert getattr(torch.utils.deterministic, "fill_uninitialized_memory")  # noqa: B009
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_worse() -> Callable[..., None]:
    """Asserts that each result's error is at most 1.5 times that of another way, or three roundings of float32."""

    def check(ours: Sequence[Tensor], others: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
        for index, (a, b, expected) in enumerate(zip(ours, others, exact, strict=True)):
            assert a.dtype == b.dtype
            error, allowed = relative(a, expected), max(1.5 * relative(b, expected), 3.6e-7)
            assert error <= allowed, f"result {index}: error {error:.2e}, of at most {allowed:.2e}"

    return check


def relative(value: Tensor, expected: Tensor) -> float:
    norm = expected.detach().norm()
    return float((value.detach().double() - expected.detach()).norm() / norm) if norm else float(value.abs().max())


@pytest.fixture
def exact() -> Callable[[Any], Any]:
    """Copies tensors, in tuples as they are, to float64 leaves."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor):
            wide = value.detach().double() if value.is_floating_point() else value
            return wide.requires_grad_(value.requires_grad)
        if isinstance(value, tuple):
            parts = [widen(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    return widen


@pytest.fixture
def eager() -> Callable[[Any, torch.dtype], Any]:
    """Casts tensors, in tuples as they are: what plain torch computes with, whose gradients reach the originals."""

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, tuple):
            parts = [cast(part, dtype) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    return cast
