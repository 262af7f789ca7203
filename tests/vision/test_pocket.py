"""The embedded `pocket-vit`, once its weights are in the tree."""

from __future__ import annotations

import pytest
import torch

from graft.studio.labelled.sources import open_source
from graft.studio.labelled.splits import make_split
from graft.studio.pocket import models
from graft.vision.base import load_base
from graft.vision.data import DataConfig, load_part

pytestmark = pytest.mark.skipif(not (models.WEIGHTS / "vit.safetensors").exists(), reason="no weights of pocket-vit")


def test_pocket_vit_is_a_base_that_knows_the_known_sprites():
    base = load_base("pocket-vit", "cpu")
    assert (base.side, len(base.classes), base.hash) == (64, 900, load_base("pocket-vit", "cpu").hash)
    x = base.normalise(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert torch.equal(x, torch.full_like(x, -1.0))


def test_pictures_of_the_world_are_not_resampled(tmp_path):
    from graft.studio.caches import Cache

    base, config = load_base("pocket-vit", "cpu"), DataConfig(dataset="pocket-count", shots=2)
    source = open_source(config)
    split = make_split(source, config)
    data = load_part(source, split.part("train"), split.classes, base.pixels, 0, Cache(tmp_path))
    expected = torch.from_numpy(source.read(data.names[0])).permute(2, 0, 1)
    assert torch.equal(data.pixels[0], expected)
