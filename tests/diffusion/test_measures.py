import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from graft.diffusion.conditions import canny
from graft.diffusion.control_scores import following
from graft.diffusion.measures import (
    background_alignment,
    edge_scores,
    harmonic,
    image_similarity,
    kid,
    map_error,
    mean_iou,
)
from graft.studio.errors import InputError


def test_image_similarity_is_the_mean_cosine():
    a, b = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 0.6, 0.8]])
    assert image_similarity(a, b) == pytest.approx((1 + 0.6 + 0.8) / 6)


def test_background_is_read_from_the_border():
    def scene(colour: tuple[int, int, int]) -> Image.Image:
        pixels = np.full((32, 32, 3), colour, np.uint8)
        pixels[6:26, 6:26] = (214, 48, 49)  # a red thing in the middle
        return Image.fromarray(pixels)

    pictures = [scene((55, 105, 200)), scene((60, 150, 80)), scene((214, 48, 49))]
    assert background_alignment(pictures, ["blue", "green", "red"]) == 1
    assert background_alignment(pictures, ["blue", "red", "green"]) == pytest.approx(1 / 3)


def test_edges_are_found_within_a_pixel():
    asked, drawn = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    asked[2], drawn[3] = 255, 255
    assert edge_scores(drawn, asked) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert edge_scores(drawn, asked, reach=0)["f1"] == 0
    drawn[6] = 255
    assert edge_scores(drawn, asked) == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    """The polynomial kernel of KID's paper on features of length sqrt(d)."""
    d = len(x)
    return float((x * d**0.5) @ (y * d**0.5) / d + 1) ** 3


def test_kid_is_the_unbiased_estimate_of_its_paper():
    torch.manual_seed(0)
    a, b = F.normalize(torch.randn(6, 5), dim=-1), F.normalize(torch.randn(4, 5) + 1, dim=-1)
    x, y = a.double().numpy(), b.double().numpy()
    within = [sum(kernel(p, q) for i, p in enumerate(z) for j, q in enumerate(z) if i != j) for z in (x, y)]
    across = sum(kernel(p, q) for p in x for q in y) / 24
    assert kid(a, b) == pytest.approx(within[0] / 30 + within[1] / 12 - 2 * across)


def test_kid_of_one_distribution_is_zero_on_average():
    torch.manual_seed(0)
    drawn = [kid(*F.normalize(torch.randn(2, 8, 4), dim=-1)) for _ in range(400)]
    assert np.mean(drawn) == pytest.approx(0, abs=3 * float(np.std(drawn)) / 20)
    shifted = [kid(F.normalize(torch.randn(8, 4), dim=-1), F.normalize(torch.randn(8, 4) + 1, dim=-1)) for _ in "1234"]
    assert min(shifted) > 0.1


def test_kid_leaves_out_pairs_that_answer_the_same_prompt():
    torch.manual_seed(0)
    a, b = F.normalize(torch.randn(2, 6, 5), dim=-1)
    prompts = [0, 0, 1, 1, 2, 2]
    total, pairs = 0.0, 0
    for i in range(6):
        for j in range(6):
            if prompts[i] != prompts[j]:
                x, y = a.double().numpy(), b.double().numpy()
                total += kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(y[i], x[j])
                pairs += 1
    assert kid(a, b, prompts) == pytest.approx(total / pairs)
    assert kid(a, a, prompts) == pytest.approx(0, abs=1e-9)


def test_labels_and_amounts_are_compared():
    asked = np.array([[0, 0], [1, 1]])
    assert mean_iou(asked, asked) == 1
    assert mean_iou(np.array([[0, 0], [0, 1]]), asked) == pytest.approx((2 / 3 + 1 / 2) / 2)
    amounts = np.array([[0.0, 1.0], [2.0, 4.0]])
    assert map_error(amounts * 3 + 7, amounts) == pytest.approx(0)
    assert map_error(4 - amounts, amounts) == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert map_error(np.zeros((2, 2)), amounts) == pytest.approx((0.25 + 0.5 + 1) / 4)


def test_neither_of_the_pair_makes_up_for_the_other():
    assert harmonic(0.5, 0.5) == pytest.approx(0.5)
    assert harmonic(1.0, 0.25) == pytest.approx(0.4)
    assert harmonic(1.0, -0.1) == 0


def square(at: int) -> np.ndarray:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[at : at + 12, at : at + 12] = 255
    return pixels


def test_following_is_told_by_the_kind_of_map():
    picture, pixels = square(8), torch.from_numpy(square(8)).permute(2, 0, 1)[None]
    maps = torch.from_numpy(canny(picture))[None, None]
    right, wrong = Image.fromarray(picture), Image.fromarray(square(16))
    assert following([[right]], maps, pixels, "canny")["edge_f1"] == 1
    assert following([[right, wrong]], maps, pixels, "canny")["edge_f1"] < 0.8
    mask = torch.zeros(1, 4, 32, 32, dtype=torch.uint8)
    mask[:, 3, 20:] = 255
    changed = picture.copy()
    changed[25:] = 200
    assert following([[Image.fromarray(changed)]], mask, pixels, "inpaint") == {"kept_error": 0.0}
    assert following([[wrong]], mask, pixels, "inpaint")["kept_error"] > 0.05
    with pytest.raises(InputError, match="map_reader"):
        following([[right]], maps, pixels, "depth")
    with pytest.raises(InputError, match="pose"):
        following([[right]], maps, pixels, "pose")
