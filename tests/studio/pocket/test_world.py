"""The atlas, the scenes and their captions: what every embedded model is trained and measured on."""

import numpy as np
import pytest
from PIL import Image

from graft.studio.errors import InputError
from graft.studio.pocket.atlas import FOLDER, Atlas
from graft.studio.pocket.pretrain.autoencoder import AutoencoderTask, crowded_scene
from graft.studio.pocket.pretrain.unet import pair_scenes, plain_scenes, varied_scenes
from graft.studio.pocket.scenes import (
    COLOURS,
    SIDE,
    Scene,
    Thing,
    caption,
    centred,
    portrait,
    render,
    sample_scene,
    side_by_side,
    with_article,
)


def test_split_covers_the_atlas_once():
    atlas = Atlas.load()
    assert sorted(atlas.known + atlas.new) == list(range(len(atlas.names)))
    assert (len(atlas.known), len(atlas.new)) == (900, 150)
    assert len(set(atlas.names)) == len(atlas.names)


def test_pixels_are_cut_from_the_committed_sheet():
    atlas = Atlas.load()
    sheet = Image.open(FOLDER / "sprites.webp").convert("RGBA")
    for index in (0, 31, 32, 700, len(atlas.names) - 1):
        x, y = index % 32 * 64, index // 32 * 64
        assert np.array_equal(atlas.pixels[index], np.asarray(sheet.crop((x, y, x + 64, y + 64))))


def test_no_two_sprites_are_the_same_picture():
    pixels = Atlas.load().pixels
    assert len({picture.tobytes() for picture in pixels}) == len(pixels)
    assert (pixels[..., 3] > 128).mean((1, 2)).min() > 0.02, "an empty sprite"


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="red apple"):
        Atlas.load().index("red aple")


def test_training_never_sees_a_new_sprite():
    known = set(Atlas.load().known)
    rng = np.random.default_rng(0)
    scenes = [crowded_scene(rng, Atlas.load().known) for _ in range(500)] + varied_scenes(5000)
    assert {thing.sprite for scene in scenes for thing in scene.things} <= known
    assert AutoencoderTask().sprites == Atlas.load().known


def test_unet_scenes_show_every_known_sprite():
    plain = plain_scenes()
    assert [(s.things[0].sprite, s.colour) for s in plain] == [(k, c) for k in Atlas.load().known for c in COLOURS]
    scenes = varied_scenes(2000)
    assert {thing.sprite for scene in scenes for thing in scene.things} == set(Atlas.load().known)


def test_pairs_show_every_known_sprite_on_both_sides_in_the_order_they_are_told():
    scenes, known, rng = pair_scenes(2 * len(Atlas.load().known)), Atlas.load().known, np.random.default_rng(0)
    for side in (0, 1):
        assert sorted(scene.things[side].sprite for scene in scenes) == sorted([*known, *known])
    names = Atlas.load().names
    for scene in scenes[:50]:
        left, right = scene.things
        assert left.x + left.size <= 64 <= right.x and left.y == right.y
        if left.sprite != right.sprite:
            a, b = (with_article(names[thing.sprite]) for thing in scene.things)
            assert caption(scene, rng).startswith((f"{a} and {b}", f"{a} left of {b}"))


def test_a_pair_is_the_two_plainest_pictures_beside_each_other():
    first, second = Atlas.load().known[:2]
    apart = [render(centred(sprite, "teal")) for sprite in (first, second)]
    assert np.array_equal(render(side_by_side(first, second, "teal")), np.concatenate(apart, axis=1))


def test_render_is_alpha_compositing():
    """At full size the formula a c + (1 - a) b can be checked pixel by pixel."""
    atlas = Atlas.load()
    sprite = atlas.index("red apple")
    rgba = atlas.pixels[sprite].astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + np.array(COLOURS["blue"]) * (1 - alpha)
    drawn = render(Scene((Thing(sprite, 64, 0, 0),), "blue"))
    assert np.abs(drawn - expected).max() <= 1.5


def test_scene_stays_inside_the_picture():
    rng = np.random.default_rng(1)
    for _ in range(2000):
        for thing in sample_scene(rng, range(50), smallest=16).things:
            assert 0 <= thing.x <= SIDE - thing.size
            assert 0 <= thing.y <= SIDE - thing.size


def test_things_in_company_do_not_overlap():
    rng = np.random.default_rng(2)
    for _ in range(300):
        scene = sample_scene(rng, range(50), objects=(0, 0.5, 0.5))
        cover = np.zeros((SIDE, SIDE), int)
        for t in scene.things:
            cover[t.y : t.y + t.size, t.x : t.x + t.size] += 1
        assert cover.max() == 1


def test_captions_are_true():
    """Names, background, size, place and relation in a caption are those of the scene."""
    atlas, rng = Atlas.load(), np.random.default_rng(3)
    for _ in range(3000):
        scene = sample_scene(rng, atlas.known)
        text = caption(scene, rng)
        assert all(atlas.names[t.sprite] in text for t in scene.things)
        if " background" in text:
            assert text.endswith(f"{scene.colour} background")
            assert (scene.texture in text) == (scene.texture != "plain")
        first = scene.things[0]
        if len(scene.things) == 1:
            name = atlas.names[first.sprite]
            assert f"small {name}" not in text or first.size <= 28
            assert f"large {name}" not in text or first.size >= 44
            centre = first.x + first.size / 2
            for word, holds in (("left", centre < SIDE / 3), ("right", centre > SIDE * 2 / 3 - 1)):
                if f"in the {word}" in text or f"top {word}" in text or f"bottom {word}" in text:
                    assert holds, text
        elif len(scene.things) == 2:
            second = scene.things[1]
            words = text.removesuffix(" background")
            assert f" left of a {atlas.names[second.sprite]}" not in words or first.x < second.x
            assert f" above a {atlas.names[second.sprite]}" not in words or first.y < second.y
            assert f" below a {atlas.names[second.sprite]}" not in words or first.y > second.y


def test_seed_names_the_data():
    def draw(seed):
        rng = np.random.default_rng(seed)
        return [caption(scene, rng) for scene in (sample_scene(rng, range(99)) for _ in range(20))]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_portrait_is_large_and_takes_its_colour():
    rng = np.random.default_rng(4)
    scenes = [portrait(rng, 3, "teal") for _ in range(50)]
    assert min(scene.things[0].size for scene in scenes) >= 44
    assert {scene.colour for scene in scenes} == {"teal"}
