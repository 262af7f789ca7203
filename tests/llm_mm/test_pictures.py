"""How pictures are cut, counted in tokens, and told when they are broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import graft
from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import Conversation, Turn
from graft.llm_mm.data import DataConfig, read_rows
from graft.llm_mm.evaluation import measured, rotated
from graft.llm_mm.jobs import checked
from graft.llm_mm.pictures import PictureStore
from graft.llm_mm.task import Reader
from graft.studio.errors import DataError

SLOW = pytest.mark.slow


@torch.no_grad()
def test_the_picture_of_another_row_may_have_more_tokens(tmp_path: Path, of_family: Callable[[str], MultimodalBase]):
    """Asked with it, a row that just fits is longer than `data.length`, and is asked all the same."""
    base, answer = of_family("LlavaNext"), Turn("assistant", ("red",))
    for name, width in (("small", 16), ("large", 64)):
        Image.new("RGB", (width, 16), "red").save(tmp_path / f"{name}.png")
    asked = {"small": "which is red , this one or that one ?", "large": "is it ?"}
    small, large = (
        Conversation(1, (Turn("user", (0, text)), answer), (str(tmp_path / f"{name}.png"),))
        for name, text in asked.items()
    )
    whole = Reader.of(base, DataConfig(path="-"))
    counts = [len(whole.tokens(row).ids) for row in (small, large)]
    turned = [len(whole.tokens(row).ids) for row in rotated(whole, [small, large])]
    assert max(turned) > max(counts)
    limited = Reader.of(base, DataConfig(path="-", length=max(counts)))
    assert measured(limited, [small, large]) == measured(whole, [small, large])


@pytest.mark.parametrize("family", ["Llava", "LlavaNext", pytest.param("Qwen2VL", marks=pytest.mark.slow)])
def test_no_picture_is_decoded_to_count_its_tokens_and_broken_ones_are_told(
    family: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_family: Callable[[str], MultimodalBase]
):
    """The header tells the size, upright and padded; a file that is no picture stops the job with its row."""
    base: Any = graft.load_base(str(tiny), "cpu", domain="llm_mm") if family == "Llava" else of_family(family)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "wide.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "square.png")
    Image.new("RGB", (64, 32)).save(tmp_path / "turned.jpg", exif=turned)
    names = ["wide.png", "turned.jpg", "square.png"]
    for fit in ("crop", "pad"):
        reader = Reader.of(base, DataConfig(path="-", fit=fit))  # type: ignore[arg-type]
        pictures = [reader.store.open(str(tmp_path / name)) for name in names]
        assert [reader.store.size(str(tmp_path / name)) for name in names] == [picture.size for picture in pictures]
        wanted = [reader.store._expanded(picture) for picture in pictures]
        with monkeypatch.context() as patch:
            patch.setattr(PictureStore, "open", lambda *args: pytest.fail("a picture was decoded"))
            assert [reader.store.expand(str(tmp_path / name)) for name in names] == wanted
        assert (len(set(map(tuple, wanted))) > 1) == (family != "Llava" and fit == "crop")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "small.png").write_bytes((tmp_path / "wide.png").read_bytes()[:20])
    table = [{"image": name, "question": "is it ?", "answer": "no"} for name in ("wide.png", "text.png", "small.png")]
    (tmp_path / "rows.json").write_text(json.dumps(table))
    found = read_rows(DataConfig(path=str(tmp_path / "rows.json"), validation=0, test=0))
    with pytest.raises(
        DataError, match=r"(?s)2 of 3 rows cannot be used.*row 2: .*text.png: not a pic.*row 3: .*small"
    ):
        checked(reader, found)
    with pytest.raises(DataError, match="none.png: there is no such file"):
        reader.store.open(str(tmp_path / "none.png"))


@torch.no_grad()
def test_a_picture_is_cropped_or_padded_as_transformers_does_it(tiny: Path):
    """A wide picture with red ends: cropped, they are gone; padded, all of it is there, on the mean colour."""
    wide = np.full((40, 120, 3), 90, np.uint8)
    wide[:, :20] = wide[:, -20:] = (250, 0, 0)
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    assert isinstance(base, MultimodalBase)
    same = {key: value for key, value in base.picture_settings.items() if key != "do_convert_rgb"}
    for fit, pads in (("crop", False), ("pad", True)):
        found = PictureStore(base, fit).inputs([wide])["pixel_values"]
        theirs = transformers.LlavaImageProcessor(**same, do_pad=pads)(
            images=[Image.fromarray(wide)], return_tensors="pt"
        )
        torch.testing.assert_close(found, theirs["pixel_values"], rtol=0, atol=0.02)  # the mean is a whole number
        red = (found[0, 0] > 0.5) & (found[0, 1] < -0.5)
        assert bool(red.any()) == pads
    assert bool((found[0, :, 0].abs() < 0.02).all())  # above the picture
