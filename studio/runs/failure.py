"""What went wrong, in one word, whether trying again may help, and what to do."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

from graft.studio.disk import is_full
from graft.studio.errors import DiskFullError, InputError

SMALLER = "graft runs clone RUN --smaller-memory makes a run with half the batch, accumulated twice"
_BUSY = ("device is busy", "devices are busy", "busy or unavailable", "connection reset", "temporarily unavailable")
_WORKER = "dataloader worker"  # one was killed: the training itself is well
_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed")
_NETWORK = {"ConnectionError", "ConnectTimeout", "ReadTimeout", "ConnectError", "RemoteProtocolError", "Timeout"}


@dataclass(frozen=True)
class Failure:
    """Of a training."""

    kind: str
    """input, disk full, out of memory, transient, died, hung, or error."""
    message: str
    """For people, with the remedy."""

    @property
    def transient(self) -> bool:
        """Whether the same job may well succeed when it is tried again."""
        return self.kind in ("transient", "died", "hung")


def classify(error: BaseException) -> Failure:
    """Tell what an exception of a training means."""
    message = str(error).strip() or type(error).__name__
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    if any(isinstance(e, DiskFullError) or (isinstance(e, OSError) and is_full(e)) for e in chain):
        hint = "" if isinstance(error, DiskFullError) else ". Free some space, then graft runs resume RUN"
        return Failure("disk full", message + hint)
    if any(_is_memory(e) for e in chain):
        return Failure("out of memory", f"{message.splitlines()[0]}. Retry with smaller memory: {SMALLER}")
    if any(_is_transient(e) for e in chain):
        return Failure("transient", message)
    return Failure("input" if isinstance(error, InputError) else "error", message)


def _is_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in _MEMORY))


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__name__ in _NETWORK:
        return True
    if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ESTALE, errno.EIO, errno.ENETUNREACH):
        return True
    words = (*_BUSY, _WORKER)
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def memory_kills() -> int:
    """Return how often the kernel has killed a process of this machine (or container) for want of memory."""
    for path, word in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        counts = dict(line.split()[:2] for line in lines if " " in line)
        if word in counts:
            return int(counts[word])
    return 0
