"""What the diffusion domain is judged by: `graft bench concepts`, `many`, `personalization`, `textual-inversion`."""

from graft.diffusion.bench.concepts import concepts
from graft.diffusion.bench.many import many
from graft.diffusion.bench.personalization import personalization
from graft.diffusion.bench.speed import textual_inversion

__all__ = ["concepts", "many", "personalization", "textual_inversion"]
