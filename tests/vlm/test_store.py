"""Features are computed once for each tower, preprocessing, picture content and view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from graft.vlm.base import ClipBase
from graft.vlm.clip_lora import ClipLoRA
from graft.vlm.data import DataConfig, fit_data
from graft.vlm.pictures import load_view
from graft.vlm.store import FeatureStore


@pytest.fixture
def data(photos: Path) -> DataConfig:
    return DataConfig(path=str(photos), shots=2)


@torch.no_grad()
def test_features_are_those_of_the_tower(base: ClipBase, data: DataConfig, tmp_path: Path):
    examples = fit_data(data).train
    found = FeatureStore(tmp_path).get(base, examples, data, [0, 3])
    for example, row in zip(examples, found, strict=True):
        pixels = torch.stack([load_view(example, view, base.preprocess, data) for view in (0, 3)])
        torch.testing.assert_close(row, base.pool(base.preprocess.normalise(pixels)), rtol=1e-5, atol=1e-5)


def test_nothing_is_computed_twice(base: ClipBase, data: DataConfig, tmp_path: Path):
    examples = fit_data(data).train
    first, second = FeatureStore(tmp_path), FeatureStore(tmp_path)
    expected = first.get(base, examples, data, [0, 1])
    assert first.computed == 12
    assert torch.equal(second.get(base, examples, data, [0, 1]), expected) and second.computed == 0
    more = second.get(base, examples, data, [1, 2])  # only the view that is new
    assert second.computed == 6 and torch.equal(more[:, 0], expected[:, 1])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_the_key_is_weights_preprocessing_content_and_crop(
    base: ClipBase, make: Callable[..., ClipBase], data: DataConfig, tmp_path: Path
):
    examples, store = fit_data(data).train, FeatureStore(tmp_path)

    def computed(base: ClipBase, data: DataConfig, views: list[int]) -> int:
        before = store.computed
        store.get(base, fit_data(data).train, data, views)
        return store.computed - before

    assert computed(base, data, [0, 1]) == 12
    assert computed(base, replace(data, crop=0.1), [0, 1]) == 6  # other crops, the same whole pictures
    assert computed(base, replace(data, background="black"), [0]) == 6
    assert computed(make(), data, [0]) == 6  # other weights
    other = replace(base, preprocess=replace(base.preprocess, mean=(0.4, 0.4, 0.4)))
    assert computed(other, data, [0]) == 6
    path = Path(data.path) / examples[0].name
    Image.new("RGB", (16, 16), "red").save(path)
    assert computed(base, data, [0]) == 1  # the edited picture


def test_features_of_an_adapted_tower_are_never_kept(make: Callable[..., ClipBase], data: DataConfig, tmp_path: Path):
    base, examples = make(), fit_data(data).train
    handle = ClipLoRA().attach(base.modules)
    with pytest.raises(ValueError, match="carries an adapter"):
        FeatureStore(tmp_path).get(base, examples, data, [0])
    handle.detach()
    assert FeatureStore(tmp_path).get(base, examples, data, [0]).shape == (6, 1, 16)


def test_a_damaged_pack_is_computed_again(base: ClipBase, data: DataConfig, tmp_path: Path):
    examples = fit_data(data).train
    expected = FeatureStore(tmp_path).get(base, examples, data, [0])
    (pack,) = tmp_path.rglob("*.safetensors")
    pack.write_bytes(pack.read_bytes()[:-8])
    again = FeatureStore(tmp_path)
    assert torch.equal(again.get(base, examples, data, [0]), expected) and again.computed == 6
    assert FeatureStore(tmp_path).get(base, examples, data, [0]).equal(expected)
