"""Choosing among several attached adapters the one that finds an input least surprising.

Andrea Madotto, Zhaojiang Lin, Zhenpeng Zhou, Seungwhan Moon, Paul Crook, Bing Liu, Zhou Yu, Eunjoon Cho, Zhiguang Wang:
Continual Learning in Task-Oriented Dialogue Systems, 2020, arXiv:2012.15504 (AdapterCL).

    chosen = argmin over adapters t of  exp(- mean over words of log p_t(word | words before))

One adapter is trained for each task, and at inference nobody says which task an input belongs to. Any method whose rows
choose their slot will do, not the authors' bottlenecks alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.studio.slots import Handle


@torch.no_grad()
def perplexities(model: Any, handle: Handle, inputs: dict[str, Any]) -> Tensor:
    """Returns the perplexity of each row of a batch under each slot, (b, slots); the route stays as it was.

    Args:
        model: a language model of transformers.
        handle: attached to it.
        inputs: what the model is called with: `input_ids` (b, n), `attention_mask`, pictures. Words that the mask lets
            through count, but for the first one, and no placeholders of pictures.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if (picture := getattr(model.config, "image_token_id", None)) is not None:
        counts = counts & (ids != picture)
    counts = counts[:, 1:] & (mask[:, :-1].bool() if mask is not None else True)
    before, found = handle.routed, []
    try:
        for slot in range(handle.slots):
            handle.route(ids.new_full((len(ids),), slot))
            logits = model(**inputs).logits[:, :-1].float()
            loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (b, n - 1)
            found.append(((loss * counts).sum(1) / counts.sum(1).clamp(min=1)).exp())
    finally:
        handle.route(before)
    return torch.stack(found, 1)


def route_by_perplexity(model: Any, handle: Handle, inputs: dict[str, Any]) -> Tensor:
    """Routes each row of a batch to the slot under which it has the lowest perplexity, and returns the route, (b,)."""
    route = perplexities(model, handle, inputs).argmin(1)
    handle.route(route)
    return route
