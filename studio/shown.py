"""What the studio's preview asks of a domain, and what it gets: pictures, shares of classes, words.

A domain takes part by two names in its package, and nothing else changes:

    ASKS = "prompts"    # or "pictures", or "conversation": what the user is asked for
    def shown(base, adapters, asked, out) -> list[Shown]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graft.studio.config import require


@dataclass(frozen=True)
class Asked:
    """One request of the preview."""

    prompts: tuple[str, ...] = ()
    """One row each; "{token}" stands for the trigger of the first adapter. Of a conversation, the questions so far."""
    pictures: tuple[str, ...] = ()
    """Files to be told apart, to follow, or to talk about."""
    seed: int = 0
    """Of the first picture."""
    strengths: tuple[float, ...] = (1.0,)
    """One column each: all adapters' weights are multiplied by it. 0 is the base."""
    weights: tuple[float, ...] = ()
    """Of each adapter in the mix; empty is 1 for all."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the domain's `PreviewConfig`."""
    known: tuple[str, ...] = ()
    """Of a preview that asks for pictures: those of the first adapter's data, where they are still there."""

    def __post_init__(self) -> None:
        require("prompts", len(self.prompts), len(self.prompts) <= 8, "at most 8")
        require("strengths", self.strengths, 1 <= len(self.strengths) <= 8, "1 to 8")
        fits = all(0 <= value <= 4 for value in (*self.strengths, *self.weights))
        require("strengths and weights", (self.strengths, self.weights), fits, "0 to 4")
        require("pictures", len(self.pictures), len(self.pictures) <= 24, "at most 24")


@dataclass(frozen=True)
class Shown:
    """One cell of what is shown."""

    row: str
    """The prompt, the name of the picture, or the question with its number."""
    column: str
    """"base", or the adapter's strength."""
    picture: str = ""
    """File, if it is a picture."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Class -> probability, the surest first."""
    text: str = ""
    """An answer, if it is one; never HTML."""

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)
