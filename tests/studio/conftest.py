"""A domain of one small regression, and jobs of it."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from graft.studio import registry


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module `toy_domain`, registered as long as the test runs."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for processes that a test starts
    module = import_module("toy_domain")
    module.register()
    yield module
    del registry.DOMAINS["toy"], registry.METHODS["toy", "regression"]


@pytest.fixture
def make_job(toy: ModuleType) -> Callable[..., dict[str, Any]]:
    """Makes the mapping of a job; keywords go into its training section."""

    def make(method: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
        train = {"steps": 6, "device": "cpu", "threads": 1, "log_every": 2, "mixed_precision": "no", **train}
        return {"base": "none", "domain": "toy", "method": {"name": "regression", **(method or {})},
                "data": data or {}, "train": train}  # fmt: skip

    return make


@pytest.fixture
def files_limited_to() -> Callable[[int], AbstractContextManager[None]]:
    """Makes the kernel refuse to let a file grow beyond so many bytes, as on a full disk."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limit
