"""What the diffusion domain is judged by: `graft bench concepts`, `graft bench personalization` and
`graft bench textual-inversion`."""

from graft.diffusion.bench.concepts import concepts
from graft.diffusion.bench.personalization import personalization
from graft.diffusion.bench.speed import textual_inversion

__all__ = ["concepts", "personalization", "textual_inversion"]
