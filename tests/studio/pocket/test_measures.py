"""The measures of the embedded models, on inputs whose answer is known."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize, one_hot

from graft.studio.pocket import measures, models, report
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.pretrain.draw import pictures
from graft.studio.pocket.scenes import COLOURS, centred


def test_psnr_of_a_constant_error():
    zeros = torch.zeros(2, 3, 8, 8)
    found = measures.psnr(zeros, zeros + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1))
    torch.testing.assert_close(found, torch.tensor([20.0, 40.0]))


def test_border_colour_reads_the_background():
    scenes = [centred(Atlas.load().known[k], colour) for k, colour in enumerate(COLOURS)]
    assert measures.border_colour(pictures(scenes)) == list(COLOURS)


def test_linear_probe_tells_what_features_tell():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 8, generator=generator)
    labels = torch.arange(5).repeat(20)
    seen, unseen = (centres[labels] + 0.05 * torch.randn(100, 8, generator=generator) for _ in range(2))
    assert measures.linear_probe(seen, labels, unseen, labels) == 100
    noise = torch.randn(100, 8, generator=generator)
    assert measures.linear_probe(noise, labels, torch.randn(100, 8, generator=generator), labels) < 45


def test_name_ranks_count_the_names_that_are_nearer(monkeypatch: pytest.MonkeyPatch):
    known = Atlas.load().known
    texts = torch.eye(len(known))
    seen = torch.zeros(3, len(known))
    seen[0, 0] = 1  # the first one's own name is nearest
    seen[1, [0, 1, 2]] = torch.tensor([3.0, 2.0, 1.0])  # one name is nearer than the second's own
    seen[2, [5, 6]] = 1  # two are nearer than the third's
    monkeypatch.setattr(measures, "text_features", lambda clip, names: texts)
    monkeypatch.setattr(measures, "image_features", lambda clip, images: normalize(seen, dim=-1))
    ranks = measures.name_ranks(None, torch.zeros(3, 3, 64, 64), [known[0], known[1], known[2]])
    assert ranks.tolist() == [0, 1, 2]


def test_class_hits_follow_the_order_of_known_sprites():
    known = Atlas.load().known

    def classifier(images: Any) -> Any:
        return one_hot(torch.tensor([0, 7, 9]), len(known)).float()

    hits = measures.class_hits(classifier, torch.zeros(3, 3, 64, 64), [known[0], known[7], known[8]])
    assert hits.tolist() == [True, True, False]


def test_new_sprites_are_no_part_of_the_choice_of_known_ones():
    atlas = Atlas.load()
    assert not set(atlas.known) & set(atlas.new)
    assert len(atlas.known) >= 500


def test_page_shows_mean_and_spread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "_parts", lambda: "| parts |")
    talks = [{"lines": [("what is this ?", "ant", "ant"), ("count the things", "two", "one")]}]
    found = [{"name": "ant", "found": [("bee", 0.5)]}]
    page = report._page({"pocket-vit": {"top-1, %": [90.0, 94.0]}}, 2, found, talks)
    assert "| pocket-vit | top-1, % | 92.00 | 90.00 to 94.00 |" in page
    assert "- ant: bee (0.50)" in page
    assert "- what is this ? **ant**\n- count the things **one** (wrong: two)" in page


def test_forward_costs_are_positive():
    seconds, memory = report._forward("clip")
    assert 0 < seconds < 10
    assert 0 < memory < 1000


@pytest.mark.slow
def test_names_are_drawn_so_that_the_classifier_tells_them():
    known = Atlas.load().known[::220]
    pipe = models.stable_diffusion()
    drawn = measures.generate(pipe, [Atlas.load().names[s] for s in known])
    assert measures.share(measures.class_hits(models.vit(), drawn, known)) > 75
    assert measures.share(measures.class_hits(models.vit(), drawn.roll(1, 0), known)) < 25


def test_answers_come_from_the_picture():
    figures = measures.measure_llava(seed=5, count=8)
    right, blind = list(figures.values())[:2]
    assert right > 70 and blind < 45


def test_single_scenes_are_of_their_sprites():
    known = Atlas.load().known[:4]
    again = measures.single_scenes(known, 1)
    assert torch.equal(again, measures.single_scenes(known, 1))
    assert not torch.equal(again, measures.single_scenes(known, 2))
    assert again.shape == (4, 3, 64, 64)
    assert np.isfinite(again.numpy()).all()
