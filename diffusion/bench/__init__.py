"""What the diffusion domain is judged by: `graft bench many`, `personalization` and `textual-inversion`."""

from graft.diffusion.bench.many import many
from graft.diffusion.bench.personalization import personalization
from graft.diffusion.bench.speed import textual_inversion

__all__ = ["many", "personalization", "textual_inversion"]
