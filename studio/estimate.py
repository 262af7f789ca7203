"""What a training will take: time, memory and disk, from a few of its own steps taken beforehand.

The job is prepared as for its training, on its own data and device, and goes through the one loop for `STEPS` steps, a
checkpoint, and a sample and a measurement if it wants such. Nothing is modelled: memory is what the device's allocator,
or on a processor the operating system, counted at the highest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STEPS = 4
"""Steps that are taken; the first, which is slower, counts for nothing unless the job has but one."""
LINE = 250
"""Bytes of a line in metrics.jsonl, about."""


@dataclass(frozen=True)
class Estimate:
    """What was counted."""

    device: str
    """That it was counted on."""
    trained: int
    """Numbers that are trained."""
    prepare: float
    """Seconds until the first step: base, data, caches. What the caches hold by then is quicker the next time."""
    step: float
    """Seconds of a step."""
    sample: float
    """Seconds of a sample; 0 if none is drawn."""
    measurement: float
    """Seconds of all that is measured on the way, once."""
    loaded: int
    """Bytes of memory before the first step: libraries, base, data."""
    peak: int
    """Bytes of memory at the highest, with gradients, moments and activations."""
    memory: int
    """Bytes that the device has, or that the machine has free."""
    checkpoint: int
    """Bytes of a checkpoint."""
    adapter: int
    """Bytes of the result."""
    picture: int
    """Bytes of a sample."""

    def seconds(self, train: dict[str, Any], every: int = 0) -> float:
        """Of the whole training.

        Args:
            train: `steps`, `validate_every` and `measure_every` of the job.
            every: steps between samples.
        """
        steps = int(train["steps"])
        measured = max(_times(steps, int(train.get(f"{what}_every", 0))) for what in ("validate", "measure"))
        return self.prepare + steps * self.step + _times(steps, every) * self.sample + measured * self.measurement

    def disk(self, train: dict[str, Any], every: int = 0) -> int:
        """Bytes of the run's folder at the most; arguments as for `seconds`."""
        steps = int(train["steps"])
        checkpoints = self.checkpoint * (int(train.get("keep_checkpoints", 2)) + 1)  # one more before the oldest goes
        pictures = 2 * self.picture * _times(steps, every)  # the sheet of all steps has each once more
        return checkpoints + 2 * self.adapter + pictures + LINE * (steps // int(train.get("log_every", 10)))

    @property
    def fits(self) -> bool:
        """Whether the memory will do."""
        return self.peak <= self.memory

    def document(self, train: dict[str, Any], every: int, disk_free: int) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        whole = {"seconds": round(self.seconds(train, every), 1), "disk": self.disk(train, every)}
        return {**whole, "disk_free": disk_free, "fits": self.fits, **asdict(self)}

    def text(self, train: dict[str, Any], every: int, disk_free: int) -> str:
        """The same for people."""
        steps = int(train["steps"])
        parts = [f"{told_time(self.prepare)} to prepare", f"{steps} steps of {told_time(self.step)}"]
        parts += [f"{_times(steps, every)} samples of {told_time(self.sample)}"] * bool(every and self.sample)
        more = "" if self.fits else " Too little: set a smaller train.batch_size, with train.gradient_accumulation."
        return (
            f"time    {told_time(self.seconds(train, every))}: {', '.join(parts)}\n"
            f"memory  {told_size(self.peak)} on {self.device}, {told_size(self.loaded)} of them once loaded; "
            f"there are {told_size(self.memory)}.{more}\n"
            f"disk    {told_size(self.disk(train, every))} at most, {told_size(self.checkpoint)} a checkpoint; "
            f"{told_size(disk_free)} are free"
        )


def _times(steps: int, every: int) -> int:
    return -(-steps // every) if every else 0


def told_time(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def told_size(size: float) -> str:
    """A number of bytes as people say it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.{1 if size < 1e7 else 0}f} MB"


def free_memory() -> int:
    """Bytes that this machine, or the container that this process is in, can still give."""
    lines = dict(line.split(":") for line in _read("/proc/meminfo").splitlines() if ":" in line)
    found = [int(lines["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in lines else []
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        files = dict(line.split() for line in _read("/sys/fs/cgroup/memory.stat").splitlines())
        found.append(int(limit) - int(used) + int(files.get("inactive_file", 0)))
    return min(found, default=0)


def resident() -> tuple[int, int]:
    """Bytes of memory that this process has now, and has had at the highest."""
    import resource
    import sys

    lines = dict(line.split(":") for line in _read("/proc/self/status").splitlines() if ":" in line)
    if "VmRSS" in lines:  # getrusage's maximum would have the memory of the process that started this one in it
        now, highest = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    else:
        now = highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return now, highest


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
