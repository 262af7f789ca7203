from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graft.diffusion.base import DiffusionBase
from graft.diffusion.previews import PreviewConfig, draw, grid, grow_sheet, preview, undisturbed
from graft.diffusion.textual_inversion import TextualInversion
from graft.studio.adapter import Adapter, Card
from graft.studio.errors import InputError


def test_a_picture_does_not_depend_on_its_company(base: DiffusionBase):
    config = PreviewConfig(steps=2)
    together = draw(base, ["a cat", "a toy"], [1, 2, 3], config)
    alone = draw(base, ["a toy"], [2], config)[0][0]
    difference = np.asarray(together[1][1]).astype(int) - np.asarray(alone).astype(int)
    assert np.abs(difference).max() <= 1
    assert [len(row) for row in together] == [3, 3]


def test_draw_is_plain_inference(base: DiffusionBase):
    mine = draw(base, ["a red cat"], [5], PreviewConfig(steps=3, guidance=4.0))[0][0]
    generator = torch.Generator().manual_seed(5)
    stock = base.pipe(["a red cat"], negative_prompt=[""], height=8, width=8, num_inference_steps=3,
                      guidance_scale=4.0, generator=[generator]).images[0]  # fmt: skip
    assert mine.tobytes() == stock.tobytes()


def test_preview_shows_with_and_without(base: DiffusionBase, tmp_path: Path):
    method = TextualInversion(token="<cat>", vectors=1)
    card = Card("textual_inversion", {"token": "<cat>", "vectors": 1}, "diffusion", base.name, base.hash)
    adapter = Adapter({"embedding": torch.ones(1, 16)}, card)
    files = preview(base, adapter, ["a photo of <cat>"], [0, 1], tmp_path, PreviewConfig(steps=2))
    names = [file.name for file in files]
    assert names == ["grid.png", *(f"{kind}-0-seed{s}.png" for kind in ("without", "with") for s in (0, 1))]
    without, with_word = (np.asarray(Image.open(files[i])) for i in (1, 3))
    assert not np.array_equal(without, with_word)
    handle = method.attach(base)
    handle.load(adapter.tensors)
    assert draw(base, ["a photo of <cat>"], [0], PreviewConfig(steps=2))[0][0].tobytes() == with_word.tobytes()
    handle.detach()
    assert len(preview(base, None, ["a cat"], [0], tmp_path / "base", PreviewConfig(steps=1))) == 2


def test_pictures_can_be_wider_than_high(base: DiffusionBase, tmp_path: Path):
    config = PreviewConfig(steps=1, resolution=16, width=32)
    files = preview(base, None, ["a cat"], [0], tmp_path, config)
    assert Image.open(files[1]).size == (32, 16)
    assert Image.open(files[0]).width > 256  # a tile is 128 pixels high, and as wide as that makes it
    with pytest.raises(InputError, match="width 20"):
        draw(base, ["a cat"], [0], PreviewConfig(steps=1, resolution=16, width=20))


def test_grid_holds_every_tile():
    colours = {"without": "red", "with": "blue"}
    blocks = {name: [[Image.new("RGB", (8, 8), c)] * 3] * 2 for name, c in colours.items()}
    sheet = np.asarray(grid(blocks, ["one", "two"], [0, 1, 2])).reshape(-1, 3)
    for colour in ([255, 0, 0], [0, 0, 255]):
        assert (sheet == colour).all(1).sum() == 6 * 128 * 128


def test_undisturbed_restores_modes_generators_and_scheduler(base: DiffusionBase):
    bank, scheduler = torch.nn.Dropout(), base.pipe.scheduler
    state = torch.random.get_rng_state()
    with undisturbed(base, bank):
        assert not bank.training and not torch.is_grad_enabled()
        torch.rand(3)
        base.pipe.scheduler.set_timesteps(7)
    assert bank.training and base.pipe.scheduler is scheduler and scheduler.num_inference_steps is None
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_word_has_no_strength(base: DiffusionBase, tmp_path: Path):
    card = Card("textual_inversion", {"token": "<cat>", "vectors": 1}, "diffusion", base.name, base.hash)
    adapter = Adapter({"embedding": torch.ones(1, 16)}, card)
    with pytest.raises(InputError, match="a word has none"):
        preview(base, adapter, ["<cat>"], [0], tmp_path, PreviewConfig(steps=1, weights=(0.5,)))
    with pytest.raises(InputError, match="1 adapters are attached"):
        preview(base, adapter, ["<cat>"], [0], tmp_path, PreviewConfig(steps=1, weights=(0.5, 1.0)))


def test_the_sheet_grows_by_step(tmp_path: Path):
    for step, colour in ((4, "blue"), (2, "red")):
        Image.new("RGB", (30, 10), colour).save(tmp_path / f"step-{step:06d}.png")
        Image.new("RGB", (30, 10), "white").save(tmp_path / f"step-{step:06d}-1.png")
    sheet = Image.open(grow_sheet(tmp_path))
    assert sheet.size == (30, 20)
    assert [sheet.getpixel((5, y)) for y in (5, 15)] == [(255, 0, 0), (0, 0, 255)]
    Image.new("RGB", (4096, 20), "green").save(tmp_path / "step-000006.png")
    assert Image.open(grow_sheet(tmp_path)).size == (2048, 30)
    assert grow_sheet(tmp_path, "-1").name == "sheet-1.png"
