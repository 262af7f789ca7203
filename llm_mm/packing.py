"""Several conversations in one row of a batch, so that little of it is padding; none of them sees another.

    p = [0 ... n_1 - 1, 0 ... n_2 - 1, ...]

Positions begin anew with each conversation. Where a model is given such positions p and no mask of padding,
transformers lets a token attend to those before it in its own conversation alone. Turning positions of Qwen's models,
which count a picture's rows and columns, are those that each conversation has when it stands alone. So loss and
gradients are those of the rows one below the other, and a row is never cut to fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.studio.errors import InputError

if TYPE_CHECKING:
    from graft.llm_mm.conversations import Conversation
    from graft.llm_mm.task import Reader

REMEDY = "Set data.packing = 0"


def together(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Returns which conversations share a row: the longest first, each in the first row with room for it.

    Args:
        lengths: tokens of each.
        most: tokens of a row; a longer conversation has a row of its own.
    """
    rows, room = list[list[int]](), list[int]()
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        place = next((row for row, free in enumerate(room) if free >= lengths[k]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(most)
        rows[place].append(k)
        room[place] -= lengths[k]
    return rows


def position_ids(model: Any, ids: Tensor, positions: Tensor, pictures: Tensor, given: dict[str, Any]) -> Tensor:
    """Returns what a model takes as positions of packed rows: (b, n), or (4, b, n) where three of them turn.

    Args:
        model: the whole model.
        ids: (b, n).
        positions: of each token in its conversation, (b, n).
        pictures: whether a token is a picture's, (b, n).
        given: what else the model is called with.
    """
    turning = getattr(model.model, "get_rope_index", None)
    if turning is None:
        return positions
    places = positions.flatten()
    row = (places == 0).cumsum(0) - 1  # of each token's conversation, if they stood one below the other

    def alone(x: Tensor) -> Tensor:
        return x.new_zeros(int(row[-1]) + 1, int(places.max()) + 1).index_put((row, places), x.flatten())

    grids = {name: value for name, value in given.items() if name.endswith("_grid_thw")}
    kinds, mask = alone(pictures.int()), alone(torch.ones_like(ids))
    turned, _ = turning(input_ids=alone(ids), mm_token_type_ids=kinds, attention_mask=mask, **grids)
    return torch.cat([positions[None], turned[:, row, places].view(3, *ids.shape)])


@torch.no_grad()
def check_packing(reader: Reader, rows: Sequence[Conversation], plan: Iterable[Any], most: int) -> None:
    """Refuses to pack where a row's conversations would notice each other.

    Args:
        reader: of the base.
        rows: some to try it with.
        plan: sites of what is attached.
        most: tokens of a packed row.

    Raises:
        InputError: the method puts something before a row or into it, or the model answers otherwise than for rows
            that are not packed.
    """
    given = f"data.packing = {most}"
    for site in plan:
        if site.role in ("decoder", "pictures"):
            what = "begins every row with what it trains" if site.role == "decoder" else "shows a row's pictures to all"
            raise InputError(given, f"this method {what}, and a packed row holds several conversations", REMEDY)
    few = sorted(rows, key=lambda row: -len(reader.tokens(row).ids))
    apart, packed = (reader.batch(few, most=most)[0] for most in (0, sum(len(reader.tokens(row).ids) for row in few)))
    want, found = (reader.logits(batch, frozen_tower=True)[0] for batch in (apart, packed))
    off = float((want - found).abs().max() / want.abs().max())
    if not off <= 1e-3:
        reason = f"{type(reader.base.model).__name__} lets conversations of one row see each other: logits differ"
        raise InputError(given, f"{reason} by {off:.2g} of the largest one", REMEDY)
