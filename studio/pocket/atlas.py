"""The sprite atlas: emoji of Noto Color Emoji as 64 x 64 RGBA pictures with a name each, split into *known* and *new*.

Known sprites are what the embedded models are pretrained on. New sprites are never shown to any of them: they are the
concepts, classes and pictures that a user adapts to. The split is part of the committed file.

`python -m graft.studio.pocket.atlas FONT.ttf` rebuilds the two committed files from Debian's `fonts-noto-color-emoji`
(SIL Open Font License 1.1, text beside the atlas) and the `emoji` package, which knows the Unicode names.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import ImageFont

FOLDER = Path(__file__).parent / "atlas"
SIZE = 64
"""Side of a sprite in pixels."""
COLUMNS = 32
"""Sprites in a row of the atlas picture."""


@dataclass(frozen=True)
class Atlas:
    """All sprites: `pixels[i]` is a (64, 64, 4) uint8 picture with straight alpha, `names[i]` its name.

    `known` and `new` are the indices of the two sides of the split.
    """

    names: tuple[str, ...]
    pixels: np.ndarray
    known: tuple[int, ...]
    new: tuple[int, ...]

    @classmethod
    @lru_cache(maxsize=1)
    def load(cls) -> Atlas:
        """Return the committed atlas; decoded once per process."""
        import numpy as np
        from PIL import Image

        table = json.loads((FOLDER / "sprites.json").read_text(encoding="utf-8"))
        sheet = np.asarray(Image.open(FOLDER / "sprites.webp").convert("RGBA"))
        names = tuple(row["name"] for row in table)
        rows = sheet.reshape(-1, SIZE, COLUMNS, SIZE, 4).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 4)
        return cls(
            names=names,
            pixels=rows[: len(names)],
            known=tuple(i for i, row in enumerate(table) if row["split"] == "known"),
            new=tuple(i for i, row in enumerate(table) if row["split"] == "new"),
        )

    def index(self, name: str) -> int:
        """Return the index of a sprite by name.

        Raises:
            InputError: no sprite has this name.
        """
        if name in self.names:
            return self.names.index(name)
        from difflib import get_close_matches

        from graft.studio.errors import InputError

        near = ", ".join(get_close_matches(name, self.names)) or "see studio/pocket/atlas/sprites.json"
        raise InputError(f"sprite {name!r}", "the atlas has no sprite of this name", f"Nearest: {near}")


# Signs, plain shapes and letters say nothing about a *thing*; families of near-equal pictures (clock faces, keycaps)
# cannot be told apart at 64 px.
_LEFT_OUT = re.compile(
    r"o’clock|-thirty|button|arrow|square|circle|diamond|triangle|input |keycap|index pointing|backhand"
    r"|sign$|symbol|mark$|exclamation|question|asterisk|loop|dash$|six-pointed|multiply|divide|^plus$"
    r"|^minus$|copyright|registered|Aquarius|Aries|^Cancer|Capricorn|Gemini|^Leo$|Libra|Ophiuchus|Pisces"
    r"|Sagittarius|Scorpio|Taurus|Virgo|circled|information|equals|dollar sign|^no |potable"
    r"|speaker (low|medium)|customs|baggage claim|left luggage|passport|middle finger|cigarette|pistol"
    r"|x-ray$|waxing|waning|^om$|wireless|trade mark|infinity|khanda|menorah|wheel of dharma|latin cross"
    r"|orthodox cross|star and crescent|star of David|part alternation|thumb sign|room$|water closet"
    r"|children crossing"
)


def build(font_path: str, sprites: int = 1050, new: int = 150, seed: int = 7) -> None:
    """Render the sprites and write `sprites.webp` and `sprites.json`.

    Pictures that are nearest to another one are dropped until `sprites` are left; `new` of them, drawn with `seed`,
    form the new side of the split.
    """
    import emoji
    import numpy as np
    from PIL import Image, ImageFont

    font = ImageFont.truetype(font_path, 109)  # the only size that this bitmap font has
    pictures: dict[str, np.ndarray] = {}
    for character, entry in sorted(emoji.EMOJI_DATA.items()):
        name = entry["en"].strip(":").replace("_", " ")
        if entry["status"] == emoji.STATUS["fully_qualified"] and _is_single(character) and not _LEFT_OUT.search(name):
            picture = _render(character, font)
            if picture is not None:
                pictures[name.replace("’", "'").replace("ñ", "n").lower()] = picture
    names = _most_distinct(pictures, sprites)
    rng = np.random.default_rng(seed)
    held_out = set(rng.choice(len(names), new, replace=False).tolist())

    rows = -(-len(names) // COLUMNS)
    cells = np.zeros((rows * COLUMNS, SIZE, SIZE, 4), np.uint8)
    cells[: len(names)] = np.stack([pictures[name] for name in names])
    sheet = cells.reshape(rows, COLUMNS, SIZE, SIZE, 4).swapaxes(1, 2).reshape(rows * SIZE, COLUMNS * SIZE, 4)
    FOLDER.mkdir(exist_ok=True)
    Image.fromarray(sheet).save(FOLDER / "sprites.webp", lossless=True, quality=100, method=6)
    table = [{"name": name, "split": "new" if i in held_out else "known"} for i, name in enumerate(names)]
    lines = ",\n".join(json.dumps(row) for row in table)
    (FOLDER / "sprites.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _is_single(character: str) -> bool:
    """Tell whether this is one picture of its own: no joined sequence, skin tone, flag or keycap."""
    codes = [ord(c) for c in character]
    joiner = 0x200D in codes or 0x20E3 in codes
    modifier = any(0x1F3FB <= c <= 0x1F3FF or 0x1F1E6 <= c <= 0x1F1FF or 0xE0000 <= c <= 0xE007F for c in codes)
    return not joiner and not modifier


def _render(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """Return the (64, 64, 4) picture of one emoji, or None if the font lacks it."""
    import numpy as np
    from PIL import Image, ImageDraw

    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((12, 12), character, font=font, embedded_color=True)
    pixels = np.asarray(canvas).astype(np.float32)
    box = canvas.getbbox()
    colours = pixels[pixels[..., 3] > 200][:, :3]
    if box is None or box[2] - box[0] < 40 or colours.size == 0 or colours.std() < 1:
        return None  # missing glyph
    # premultiplied, or the resampling would bleed hidden colours into the edge
    pixels[..., :3] *= pixels[..., 3:] / 255
    side = max(box[2] - box[0], box[3] - box[1])
    left, top = (box[0] + box[2] - side) // 2, (box[1] + box[3] - side) // 2
    square = (left, top, left + side, top + side)
    planes = [
        Image.fromarray(pixels[..., k]).crop(square).resize((SIZE, SIZE), Image.Resampling.LANCZOS) for k in range(4)
    ]
    small = np.clip(np.stack([np.asarray(plane) for plane in planes], axis=-1), 0, 255)
    small[..., :3] = np.where(small[..., 3:] > 0, small[..., :3] * 255 / np.maximum(small[..., 3:], 1), 0)
    # 6 bits a colour and 4 bits of alpha: invisible, and the file is half as large
    small[..., :3] = np.clip((small[..., :3] / 4).round() * 4, 0, 255)
    small[..., 3] = (small[..., 3] / 17).round() * 17
    return small.astype(np.uint8)


def _most_distinct(pictures: dict[str, np.ndarray], count: int) -> list[str]:
    """Return `count` names, dropping one of the two most similar pictures again and again."""
    import numpy as np

    names = sorted(pictures)
    stack = np.stack([pictures[name] for name in names]).astype(np.float32) / 255
    flat = stack[..., :3] * stack[..., 3:] + 0.5 * (1 - stack[..., 3:])
    flat = flat.reshape(len(names), 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(names), -1)
    square = (flat**2).sum(1)
    distance = square[:, None] + square[None] - 2 * flat @ flat.T
    np.fill_diagonal(distance, np.inf)
    alive = np.ones(len(names), bool)
    while alive.sum() > count:
        i, j = np.unravel_index(np.argmin(distance), distance.shape)
        # of the closest pair, drop the one whose second neighbour is nearer: it lives in the denser crowd
        loser = i if np.partition(distance[i], 1)[1] < np.partition(distance[j], 1)[1] else j
        alive[loser] = False
        distance[loser, :] = distance[:, loser] = np.inf
    return [name for name, keep in zip(names, alive, strict=True) if keep]


if __name__ == "__main__":
    build(sys.argv[1])
