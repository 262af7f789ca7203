"""Shapes of about one area, so that pictures need not be cut square: each is cut to the nearest of them."""

from __future__ import annotations

from functools import cache
from math import log

Shape = tuple[int, int]
"""Height and width in pixels."""


@cache
def shapes(side: int, multiple: int, aspect: float) -> tuple[Shape, ...]:
    """The shapes of about side x side pixels whose sides are multiples of `multiple`, the square among them.

    Args:
        side: of the square in pixels.
        multiple: of pixels.
        aspect: longest side over shortest, at most.

    Example:
        >>> shapes(64, 16, 2.0)
        ((48, 80), (48, 96), (64, 64), (80, 48), (96, 48))
    """
    found = {(side, side)}
    for width in range(multiple, int(side * aspect) + 1, multiple):
        height = max(multiple, round(side * side / width / multiple) * multiple)
        off = height * width / side**2
        if max(height, width) <= aspect * min(height, width) and 0.8 <= off <= 1.25:
            found |= {(height, width), (width, height)}
    return tuple(sorted(found))


def nearest(size: tuple[int, int], among: tuple[Shape, ...]) -> Shape:
    """The shape that cuts least off a picture.

    Args:
        size: of the picture, width and height.
        among: as `shapes` gives them.
    """
    width, height = size
    return min(among, key=lambda shape: (abs(log(shape[1] / shape[0]) - log(width / height)), shape))
