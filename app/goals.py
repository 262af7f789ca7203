"""What people want to teach, and the methods and bases that do it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from graft.studio import registry


@dataclass(frozen=True)
class Goal:
    """Something that people want to teach."""

    methods: dict[str, tuple[str, ...]]
    """Domain -> methods that do it, the usual one first."""
    bases: tuple[str, ...]
    """Embedded bases for it."""
    data: dict[str, Any] = field(default_factory=dict)
    """What its `[data]` says beside the path."""
    method: dict[str, Any] = field(default_factory=dict)
    """What its `[method]` says, of the settings that the method has."""
    classes: bool = False
    """Whether every picture has a class."""
    questions: bool = False
    """Whether a table of questions or conversations stands beside the pictures."""

    def known(self, domain: str) -> list[str]:
        """The methods that a domain has today."""
        return [name for name in self.methods[domain] if (domain, name) in registry.METHODS]

    @property
    def domains(self) -> list[str]:
        """Those that can train it today."""
        return [domain for domain, names in self.methods.items() if (domain, names[0]) in registry.METHODS]


GOALS = {
    "A subject": Goal(
        {"diffusion": ("lora", "textual_inversion", "pivotal", "custom_diffusion", "dora")}, ("pocket-sd",)
    ),
    "A style": Goal(
        {"diffusion": ("lora", "textual_inversion", "pivotal", "dora")},
        ("pocket-sd",),
        data={"caption": "a picture in the style of {token}"},
        method={"templates": "style"},
    ),
    "A classifier": Goal(
        {
            "vision": ("lora", "vpt", "adaptformer", "adapter_plus", "ssf", "bitfit", "linear", "full"),
            "vlm": (
                "clip_lora", "coop", "cocoop", "clip_adapter", "tip_adapter_f", "tip_adapter", "cross_modal",
                "task_res", "prolip",
            ),
        },
        ("pocket-vit", "pocket-clip"),
        classes=True,
    ),
    "A control (edges)": Goal({"diffusion": ("controlnet",)}, ("pocket-sd",)),
    "Questions about pictures": Goal(
        {
            "llm_mm": (
                "lora", "llava", "dora", "lora_fa", "ia3", "prefix_tuning", "prompt_tuning", "llama_adapter",
                "llama_adapter_multimodal", "llama_adapter_v2",
            )
        },
        ("pocket-llava",),
        questions=True,
    ),
}  # fmt: skip
BASE = re.compile(r"[A-Za-z0-9][\w.-]*(:?[/:][\w.-]+){0,2}")
"""Names of bases that a browser may give: embedded, timm's, or of a hub. No folder of this machine."""


def domain_of(goal: str, base: str) -> str:
    """The domain that trains a goal on a base."""
    domains = GOALS[goal].domains
    of = registry.domain_of_base(base) if BASE.fullmatch(base) else None
    return of if of in domains else domains[0]
