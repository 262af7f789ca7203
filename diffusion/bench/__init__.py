"""What the diffusion domain is judged by: `graft bench personalization` and `graft bench textual-inversion`."""

from graft.diffusion.bench.personalization import personalization
from graft.diffusion.bench.speed import textual_inversion

__all__ = ["personalization", "textual_inversion"]
