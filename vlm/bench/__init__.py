"""What the domain is judged by: `graft bench few-shot` and `graft bench clip-speed`."""

from graft.vlm.bench.few_shot import few_shot
from graft.vlm.bench.speed import speed

__all__ = ["few_shot", "speed"]
