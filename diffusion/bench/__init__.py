"""What the diffusion domain is judged by, one function for each name of `graft bench`."""

from graft.diffusion.bench.concepts import concepts
from graft.diffusion.bench.control import control
from graft.diffusion.bench.control_speed import controlnet
from graft.diffusion.bench.ip_adapter import ip_adapter
from graft.diffusion.bench.many import many
from graft.diffusion.bench.personalization import personalization
from graft.diffusion.bench.script_speed import custom_diffusion_speed, lora_speed
from graft.diffusion.bench.speed import textual_inversion

__all__ = [
    "concepts",
    "control",
    "controlnet",
    "custom_diffusion_speed",
    "ip_adapter",
    "lora_speed",
    "many",
    "personalization",
    "textual_inversion",
]
