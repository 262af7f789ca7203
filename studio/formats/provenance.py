"""Where an adapter comes from, in the header of every file that is written: what made it, from which base and data.

Keys that begin with ``modelspec.`` are those of Stability AI's ModelSpec 1.0, which other programs show; those that
begin with ``graft.`` say the rest. All values are strings, as safetensors wants them; readers of the tensors take no
notice.
The date is the adapter's, not that of writing, so the same adapter gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter, Card

_KINDS = {"textual_inversion": "textual-inversion", "controlnet": "controlnet"}
_BEGINS = ("modelspec.", "graft.")


def header(card: Card) -> dict[str, str]:
    """Returns the entries for an adapter; one that was read from a file with entries keeps them."""
    reworked = {"graft.reworked": "; ".join(card.details["reworked"])} if "reworked" in card.details else {}
    if kept := card.details.get("provenance"):
        return dict(kept) | reworked
    of: dict[str, Any] = {
        "graft.method": card.method,
        "graft.config": card.config,
        "graft.base": card.base,
        "graft.base_hash": card.base_hash,
        "graft.data_digest": card.data_digest,
        "graft.trigger": card.trigger,
        "graft.metrics": card.metrics,
        "graft.versions": card.versions,
        "graft.created": card.created,
    }
    entries = {key: value if isinstance(value, str) else _json(value) for key, value in of.items() if value}
    return entries | reworked | modelspec(card)


def modelspec(card: Card) -> dict[str, str]:
    """Returns ModelSpec's entries alone; the architecture is there when the card's details name it."""
    entries = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": card.trigger or card.method,
        "modelspec.date": card.created,
    }
    if card.trigger:
        entries["modelspec.trigger_phrase"] = card.trigger
    if family := card.details.get("architecture"):
        entries["modelspec.architecture"] = f"{family}/{_KINDS.get(card.method, 'lora')}"
        entries["modelspec.implementation"] = "diffusers"
    return entries


def restored(adapter: Adapter, metadata: Mapping[str, str]) -> Adapter:
    """Returns an adapter that was read with what its header says of it.

    The base's hash stays among the details: a file of another library may be tried on another base.
    """
    kept = {key: value for key, value in sorted(metadata.items()) if key.startswith(_BEGINS)}
    if not kept:
        return adapter
    card = replace(
        adapter.card,
        base=kept.get("graft.base", adapter.card.base),
        data_digest=kept.get("graft.data_digest", ""),
        trigger=kept.get("graft.trigger") or kept.get("modelspec.trigger_phrase") or adapter.card.trigger,
        created=kept.get("graft.created") or kept.get("modelspec.date") or adapter.card.created,
        versions=_mapping(kept.get("graft.versions")) or adapter.card.versions,
        metrics=_mapping(kept.get("graft.metrics")),
        details={**adapter.card.details, "provenance": kept},
    )
    return replace(adapter, card=card)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _mapping(text: str | None) -> dict[str, Any]:
    """A mapping from its JSON; empty if it is none, as a header that nobody promised may be."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
