"""How well drawings follow the maps that a ControlNet was shown, by the kind of map."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import numpy as np
from PIL import Image
from torch import Tensor

from graft.diffusion.conditions import MADE
from graft.diffusion.features import MapReader
from graft.diffusion.measures import edge_scores, map_error, mean_iou
from graft.diffusion.previews import Pictures
from graft.studio.errors import InputError

Score = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, float]]
"""Of a drawing (h, w, 3), its map (c, h, w), and the picture that the map belongs to (h, w, 3)."""


def following(
    drawn: Pictures, maps: Tensor, pictures: Tensor, kind: str, reach: int = 1, reader: str = ""
) -> dict[str, float]:
    """Means over all drawings.

    Args:
        drawn: a row for each map.
        maps: (r, c, h, w) uint8, what drawings were to follow.
        pictures: (r, 3, h, w) uint8, which the maps belong to.
        kind: of the maps. canny and scribble: `edge_precision`, `edge_recall` and `edge_f1` of the drawing's own edges;
            soft_edge and depth: `map_error` (0 best, to 1); segmentation: `iou`; inpaint: `kept_error`, the mean
            difference, 0 to 1, of what was not to be made anew.
        reach: pixels within which an edge counts as found.
        reader: model that reads depth or labels.

    Raises:
        InputError: a kind that nothing here can read from a drawing.
    """
    score = _score(kind, reach, reader)
    rows = [
        score(np.asarray(drawing.convert("RGB")), asked.numpy(), picture.permute(1, 2, 0).numpy())
        for row, asked, picture in zip(drawn, maps, pictures, strict=True)
        for drawing in row
    ]
    return {name: mean(row[name] for row in rows) for name in rows[0]}


def _score(kind: str, reach: int, reader: str) -> Score:
    if kind in ("canny", "scribble"):

        def edges(drawing: np.ndarray, asked: np.ndarray, picture: np.ndarray) -> dict[str, float]:
            return {f"edge_{name}": value for name, value in edge_scores(MADE[kind](drawing), asked[0], reach).items()}

        return edges
    if kind == "soft_edge":
        return lambda drawing, asked, picture: {"map_error": map_error(MADE[kind](drawing), asked[0])}
    if kind == "inpaint":
        return _kept
    if kind not in ("depth", "segmentation"):
        reason = "nothing here reads such a map from a drawing"
        raise InputError(f"condition {kind!r}", reason, "Look at it with graft preview")
    if not reader:
        remedy = "Add --set map_reader=NAME, a depth estimator or semantic segmenter of transformers"
        raise InputError("eval.map_reader", f"a model must read the {kind} of what is drawn", remedy)
    model = MapReader(reader, kind)
    if kind == "depth":
        return lambda drawing, asked, picture: {"map_error": map_error(model.read(Image.fromarray(drawing)), asked[0])}
    return lambda drawing, asked, picture: {"iou": mean_iou(model.read(Image.fromarray(drawing)), _labels(asked))}


def _kept(drawing: np.ndarray, asked: np.ndarray, picture: np.ndarray) -> dict[str, float]:
    kept = asked[3] <= 127
    difference = np.abs(drawing.astype(np.float64) - picture) / 255
    return {"kept_error": float(difference[kept].mean()) if kept.any() else 0.0}


def _labels(asked: np.ndarray) -> np.ndarray:
    """Label numbers of a segmentation map.

    Raises:
        InputError: it is coloured, and nobody told which colour is which label.
    """
    if not (asked == asked[:1]).all():
        remedy = "Write maps in grey, where the value is the model's label number"
        raise InputError("segmentation map", "its colours do not tell the numbers of labels", remedy)
    return asked[0]
