"""What the diffusion domain is judged by: `graft bench personalization`, `textual-inversion` and `ip-adapter`."""

from graft.diffusion.bench.ip_adapter import ip_adapter
from graft.diffusion.bench.personalization import personalization
from graft.diffusion.bench.speed import textual_inversion

__all__ = ["ip_adapter", "personalization", "textual_inversion"]
