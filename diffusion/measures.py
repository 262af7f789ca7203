"""What drawings are measured by, as functions of pictures, maps and features alone; no model is loaded here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from graft.studio.pocket import scenes

COLOURS = {name: scenes.COLOURS[name] for name in ("red", "yellow", "green", "blue", "black", "white")}
"""Colours that are asked for, as sRGB; they lie far apart, so that the nearest one is no matter of taste."""


def image_similarity(drawn: Tensor, real: Tensor) -> float:
    """Mean cosine between every drawn and every real picture: (a, d) and (b, d) unit features.

    CLIP-I and DINO-I of Ruiz et al., 2022, arXiv:2208.12242, by whose features these are.
    """
    return float((drawn @ real.T).mean())


def background_alignment(pictures: Sequence[Image.Image], asked: Sequence[str]) -> float:
    """Share of pictures whose border is nearest to the colour that was asked for.

    The border is the outermost sixteenth on every side; its median colour is compared in sRGB with `COLOURS`.
    """
    names, table = list(COLOURS), np.array(list(COLOURS.values()), dtype=np.float64)
    right = 0
    for picture, colour in zip(pictures, asked, strict=True):
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
        rim = max(1, min(pixels.shape[:2]) // 16)
        border = np.ones(pixels.shape[:2], dtype=bool)
        border[rim:-rim, rim:-rim] = False
        median = np.median(pixels[border], axis=0)
        right += names[int(((table - median) ** 2).sum(1).argmin())] == colour
    return right / len(pictures)


def kid(a: Tensor, b: Tensor, prompts: Sequence[int] | None = None) -> float:
    """Kernel distance of two sets of pictures (Binkowski et al., 2018, arXiv:1801.01401), unbiased: about 0 for no
    change, and possibly below.

    The squared distance of means under the kernel k(x, y) = (x y / d + 1)^3 of unit features scaled to length sqrt(d):

        mean over i != j of k(a_i, a_j) + k(b_i, b_j), less twice the mean of k(a_i, b_j)

    Args:
        a: (n, d) unit features.
        b: (m, d) unit features.
        prompts: what row i of both sets was drawn for. Then pairs that answer the same prompt are left out everywhere,
            as those of a row with itself are: two drawings of one prompt are no independent draws from the sets.

    Returns:
        nan where a set is too small to have pairs.
    """
    a, b = a.double(), b.double()
    aa, bb, ab = ((x @ y.T + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    if prompts is None:
        off = [x.sum() - x.diagonal().sum() for x in (aa, bb)]
        n, m = len(a), len(b)
        return float(off[0] / (n * (n - 1)) + off[1] / (m * (m - 1)) - 2 * ab.mean())
    which = torch.tensor(prompts)
    return float((aa + bb - ab - ab.T)[which[:, None] != which].mean())


def edge_scores(drawn: np.ndarray, asked: np.ndarray, reach: int = 1) -> dict[str, float]:
    """Precision, recall and F1 of edges: (h, w) each, of which what is not 0 is an edge.

    Args:
        drawn: edges of what was drawn.
        asked: edges that were asked for.
        reach: pixels in every direction within which an edge counts as found.
    """
    a, b = (torch.from_numpy(edges > 0).float()[None, None] for edges in (drawn, asked))
    wide = [F.max_pool2d(edges, 2 * reach + 1, 1, reach) for edges in (a, b)]
    precision = float((a * wide[1]).sum() / a.sum().clamp(min=1))
    recall = float((b * wide[0]).sum() / b.sum().clamp(min=1))
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(precision + recall, 1e-9)}


def mean_iou(drawn: np.ndarray, asked: np.ndarray) -> float:
    """Intersection over union of labels, (h, w) each, as the mean over the labels that occur in what was asked for."""
    each = [((drawn == label) & (asked == label)).sum() / ((drawn == label) | (asked == label)).sum()
            for label in np.unique(asked)]  # fmt: skip
    return float(np.mean(each))


def map_error(drawn: np.ndarray, asked: np.ndarray) -> float:
    """Mean absolute difference of two maps of amounts, (h, w) each, after each was stretched to 0 to 1.

    Depth from one picture is known up to its scale and origin only, and so are strengths of edges.
    """
    low, high = (stretched(each) for each in (drawn, asked))
    return float(np.abs(low - high).mean())


def stretched(amounts: np.ndarray) -> np.ndarray:
    """Amounts from 0 to 1; one amount everywhere is 0."""
    amounts = amounts.astype(np.float64) - amounts.min()
    return amounts / max(float(amounts.max()), 1e-9)


def harmonic(fidelity: float, alignment: float) -> float:
    """Harmonic mean, by which the pair is judged: near the smaller of both, so neither makes up for the other."""
    fidelity, alignment = max(fidelity, 0.0), max(alignment, 0.0)
    return 2 * fidelity * alignment / max(fidelity + alignment, 1e-9)
