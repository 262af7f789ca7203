"""Variants of known sprites, and the pseudo-words that tell them to the UNet."""

from collections.abc import Sequence
from math import pi
from pathlib import Path

import numpy as np
import pytest
import torch

from graft.studio.errors import InputError
from graft.studio.job import TrainConfig
from graft.studio.pocket import models
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.pretrain import unet, variants
from graft.studio.pocket.pretrain.unet import Unet, UnetTask
from graft.studio.pocket.pretrain.variants import MARK, PseudoWords, cached_variants, placed, variant
from graft.studio.pocket.scenes import COLOURS, centred, render, side_by_side


def test_a_third_of_a_turn_moves_red_to_green_and_leaves_grey():
    turn = variants._hue_turn(2 * pi / 3)
    assert np.eye(3)[0] @ turn.T == pytest.approx([0, 1, 0], abs=1e-12)
    assert np.full(3, 90.0) @ turn.T == pytest.approx([90, 90, 90])


def test_variants_differ_from_the_sprites_and_from_each_other():
    rng, known = np.random.default_rng(0), Atlas.load().known
    drawn = [variant(rng, known) for _ in range(40)]
    assert all(one.shape == (64, 64, 4) and one.dtype == np.uint8 for one in drawn)
    assert len({one.tobytes() for one in drawn}) == 40
    same = sum(any(np.array_equal(one, Atlas.load().pixels[k]) for k in known) for one in drawn)
    assert same < 12


def test_one_sprite_makes_variants_of_itself_only():
    known = Atlas.load().known[3]
    opaque = {int((variant(np.random.default_rng(seed), [known])[..., 3] > 0).sum()) for seed in range(20)}
    assert min(opaque) > 0  # halves of one sprite are that sprite, however it is turned
    assert (Atlas.load().pixels[known][..., 3] > 0).sum() in opaque


def test_placed_is_what_a_scene_shows():
    sprite = Atlas.load().known[5]
    ours = placed("teal", (Atlas.load().pixels[sprite], centred(sprite, "teal").things[0]))
    theirs = torch.from_numpy(render(centred(sprite, "teal"))).permute(2, 0, 1) / 127.5 - 1
    assert (ours - theirs).abs().mean() < 0.01
    assert (ours[:, 0, 0] * 127.5 + 127.5).round().tolist() == list(COLOURS["teal"])


@pytest.fixture(scope="module")
def parts():
    return models.autoencoder(), models.clip().vision_model, models.text_encoder(), models.load_tokenizer()


def test_variants_are_made_of_known_sprites_and_once(parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []

    def record(rng: np.random.Generator, sprites: Sequence[int]) -> np.ndarray:
        seen.extend(sprites)
        return variant(rng, sprites)

    monkeypatch.setattr(variants, "variant", record)
    first = cached_variants(parts[0], parts[1], 12, tmp_path)
    assert set(seen) == set(Atlas.load().known)
    count = len(seen)
    again = cached_variants(parts[0], parts[1], 12, tmp_path)
    assert len(seen) == count and len(list(tmp_path.iterdir())) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.latents.shape == (12, 16, 8, 8) and first.features.shape == (12, 384)


def test_a_variant_in_company_is_told_with_its_neighbour_on_the_right_side(parts, tmp_path: Path):
    vae, tower = parts[:2]
    drawn = cached_variants(vae, tower, 8, tmp_path, paired=True)
    assert torch.equal(cached_variants(vae, tower, 8, tmp_path).company, torch.full((8, 1), -1))
    assert drawn.latents.shape == (8, 16, 8, 16)
    assert ((drawn.company < 0).sum(1) == 1).all() and set(drawn.company.amax(1).tolist()) <= set(Atlas.load().known)
    rng, found = np.random.default_rng(0), set()
    with torch.no_grad():
        pictures = vae.decode(drawn.latents.float()).sample
    for row, company in enumerate(drawn.company.tolist()):
        left = company[1] < 0  # where the neighbour is
        name = Atlas.load().names[max(company)]
        told = drawn.caption(row, rng)
        assert (told.index(name) < told.index(MARK)) == left and told.count(MARK) == 2
        found.add(" left of " in told)
        scene = render(side_by_side(max(company), max(company), list(COLOURS)[int(drawn.colours[row])]))
        wanted = torch.from_numpy(scene).permute(2, 0, 1) / 127.5 - 1
        away = [(pictures[row] - wanted)[..., half].square().mean() for half in (slice(0, 64), slice(64, 128))]
        assert (away[0] < away[1]) == left  # the half that shows the neighbour looks like it
    assert found == {True, False}


def test_pseudo_words_stand_where_the_marks_are(parts):
    """Words equal to rows of the token table give what the tokens themselves give; rows without marks stay."""
    text, tokenizer = parts[2], parts[3]
    ids = tokenizer(["a ghost on a red background", f"a {MARK} {MARK} here"], padding="max_length", return_tensors="pt")
    words = PseudoWords(text, tokenizer(MARK).input_ids[1], torch.randn(8, 384))
    told = tokenizer("red apple").input_ids[1:3]
    table = text.get_input_embeddings().weight
    with torch.no_grad():
        words.map.weight.zero_()
        words.map.bias.copy_(table[told].flatten())
        found = words.context(ids.input_ids, torch.randn(1, 384))
        plain = tokenizer(
            ["a ghost on a red background", "a red apple here"], padding="max_length", return_tensors="pt"
        )
        expected = text(plain.input_ids).last_hidden_state
        assert torch.equal(found, expected)
        assert torch.equal(text(ids.input_ids).last_hidden_state[0], expected[0])  # no hook is left behind


def test_no_caption_has_the_mark(parts):
    tokenizer = parts[3]
    mark = tokenizer(MARK).input_ids
    assert len(mark) == 3
    assert all(mark[1] not in tokenizer(name).input_ids for name in Atlas.load().names)


def test_a_share_of_the_batch_are_variants_and_their_words_learn(
    parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    vae, tower, text, tokenizer = parts
    plain = unet.plain_scenes
    monkeypatch.setattr(unet, "plain_scenes", lambda colours: plain(colours)[:16])
    shares = {"plain": 1 / 3, "pairs": 1 / 3}
    task = UnetTask(vae, text, tokenizer, tmp_path, scenes=8, batch_size=12, plain_colours=("blue",), **shares)
    drawn = [cached_variants(vae, tower, 10, tmp_path, paired=paired) for paired in (False, True)]
    task.add_variants(drawn, vae.config.scaling_factor, share=0.5)
    alone, pairs = batch = task.batch(0, torch.Generator().manual_seed(0))
    mark = tokenizer(MARK).input_ids[1]
    assert (alone.input_ids == mark).sum(1).tolist() == [0] * 4 + [2] * 4
    assert (pairs.input_ids == mark).sum(1).tolist() == [0] * 2 + [2] * 2
    assert alone.features is not None and len(alone.features) == 4 and alone.latents.shape == (8, 16, 8, 8)
    assert pairs.features is not None and len(pairs.features) == 2 and pairs.latents.shape == (4, 16, 8, 16)
    loss, _ = task(batch)
    loss.backward()
    assert task.words is not None
    grad = task.words.map.weight.grad
    assert grad is not None and grad.abs().sum() > 0
    groups = task.param_groups()
    assert [group.get("lr_scale", 1.0) for group in groups] == [1.0, 4.0]
    trained = {id(p) for p in task.parameters() if p.requires_grad}
    assert {id(p) for group in groups for p in group["params"]} == trained
    assert task.adapter({}).tensors.keys() == models.unet().state_dict().keys()


def test_shares_of_more_than_a_batch_are_refused():
    with pytest.raises(InputError, match="together at most 1"):
        Unet(plain=0.75, pairs=0.5).task(TrainConfig())


def test_variants_are_off_unless_asked_for():
    assert Unet().variant_share == 0
    assert TrainConfig().workers == 0
