from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from graft.diffusion.base import DiffusionBase
from graft.diffusion.evaluation import Clip, EvaluationConfig, background_alignment, evaluate, image_similarity
from graft.studio.errors import InputError


@pytest.fixture
def clip_folder(tmp_path: Path, base: DiffusionBase) -> Path:
    torch.manual_seed(0)
    words = base.tokenizer
    text = base.pipe.text_encoder.config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    path = tmp_path / "clip"
    CLIPModel(config).save_pretrained(path)
    words.save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(path)
    return path


def test_features_are_unit_and_those_of_clip(clip_folder: Path, photos: Path):
    clip = Clip(str(clip_folder))
    pictures = [Image.open(file) for file in sorted(photos.iterdir())]
    features = clip.images(pictures)
    assert features.norm(dim=-1).tolist() == pytest.approx([1] * 5)
    inputs = clip.tokenizer(["a red cat"], padding="max_length", max_length=24, return_tensors="pt")
    inputs["pixel_values"] = clip.processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        reference = clip.model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(features, reference.image_embeds)
    torch.testing.assert_close(clip.texts(["a red cat"]), reference.text_embeds)


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


def test_evaluate_reports_the_pair(base: DiffusionBase, photos: Path, clip_folder: Path):
    settings = EvaluationConfig(path=str(photos), clip=str(clip_folder), seeds=1, steps=2, colours=("red",))
    metrics = evaluate(base, None, settings)
    assert set(metrics) == {"image_similarity", "text_alignment", "background_alignment"}
    assert all(-1 <= value <= 1 for value in metrics.values())
    assert metrics == evaluate(base, None, settings)


def test_unknown_colours_and_clips_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="mauve"):
        EvaluationConfig(colours=("mauve",))
    with pytest.raises(InputError, match="no CLIP can be loaded"):
        Clip(str(tmp_path))


def test_missing_pictures_and_strange_prompts_are_refused(base: DiffusionBase, clip_folder: Path):
    with pytest.raises(InputError, match="nothing to compare with"):
        evaluate(base, None, EvaluationConfig(clip=str(clip_folder)))
    with pytest.raises(InputError, match="braces"):
        EvaluationConfig(prompts=("a {token} dog",))
