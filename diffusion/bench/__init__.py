"""What the diffusion domain is judged by: `graft bench` personalization, textual-inversion, control, controlnet."""

from graft.diffusion.bench.control import control
from graft.diffusion.bench.control_speed import controlnet
from graft.diffusion.bench.personalization import personalization
from graft.diffusion.bench.speed import textual_inversion

__all__ = ["control", "controlnet", "personalization", "textual_inversion"]
