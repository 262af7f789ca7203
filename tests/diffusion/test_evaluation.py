from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
)

import graft
from graft.diffusion.base import DiffusionBase
from graft.diffusion.control_scores import following
from graft.diffusion.controlnet import ControlNet
from graft.diffusion.data import DataConfig, load_dataset
from graft.diffusion.evaluation import (
    EvaluationConfig,
    FollowerYardstick,
    evaluate,
    evaluation_settings,
    measured_on,
)
from graft.diffusion.features import Clip, Eye, MapReader
from graft.diffusion.jobs import prepare
from graft.diffusion.measures import kid
from graft.diffusion.method import latents
from graft.diffusion.objectives import objective_for
from graft.diffusion.pair import Yardstick, real_pictures
from graft.diffusion.previews import PreviewConfig, draw, preview
from graft.diffusion.validation import ROWS, drawing_loss, held_out
from graft.studio.adapter import Adapter, Card
from graft.studio.caches import Cache
from graft.studio.config import from_dict
from graft.studio.errors import InputError
from graft.studio.job import Job


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


def test_evaluate_reports_the_pair(base: DiffusionBase, photos: Path, clip_folder: Path):
    settings = EvaluationConfig(path=str(photos), clip=str(clip_folder), seeds=1, steps=2, colours=("red",))
    metrics = evaluate(base, None, settings)
    assert set(metrics) == {"image_similarity", "text_alignment", "background_alignment", "validation_loss"}
    assert all(-1 <= metrics[name] <= 1 for name in metrics.keys() - {"validation_loss"})
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


@pytest.fixture
def dino_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    path = tmp_path / "dino"
    Dinov2Model(config).save_pretrained(path)
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(path)
    return path


def test_an_eye_of_transformers_gives_the_class_token(dino_folder: Path, photos: Path):
    eye, picture = Eye(str(dino_folder)), Image.open(photos / "0.png").convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(dino_folder)([picture], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        token = Dinov2Model.from_pretrained(dino_folder)(pixels).pooler_output
    torch.testing.assert_close(eye.images([picture]), torch.nn.functional.normalize(token, dim=-1))


def test_an_eye_of_timm_gives_what_its_classifier_is_given(tmp_path: Path, photos: Path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).eval()
    timm.models.save_for_hf(model, tmp_path / "vit", safe_serialization=True)
    eye, pictures = Eye(str(tmp_path / "vit")), [Image.open(file).convert("RGB") for file in sorted(photos.iterdir())]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        reference = model.forward_head(
            model.forward_features(torch.stack([transform(each) for each in pictures])), pre_logits=True
        )
    found = eye.images(pictures)
    assert found.norm(dim=-1).tolist() == pytest.approx([1] * 5)
    torch.testing.assert_close(found, torch.nn.functional.normalize(reference, dim=-1), rtol=0.05, atol=0.01)


def test_models_that_cannot_look_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="AutoModel"):
        Eye(str(tmp_path))


def test_depth_and_labels_are_read_by_models_of_transformers(tmp_path: Path):
    torch.manual_seed(0)
    small = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [1], "hidden_sizes": [8], "patch_sizes": [3],
             "strides": [2], "num_attention_heads": [1], "mlp_ratios": [1], "decoder_hidden_size": 8}  # fmt: skip
    SegformerForSemanticSegmentation(SegformerConfig(**small, num_labels=3)).save_pretrained(tmp_path)
    SegformerImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    labels = MapReader(str(tmp_path), "segmentation").read(picture)
    assert labels.shape == (24, 32) and set(np.unique(labels)) <= {0, 1, 2}
    maps = torch.from_numpy(labels.astype(np.uint8)).expand(1, 3, 24, 32)
    told = following([[picture]], maps, torch.zeros(1, 3, 24, 32, dtype=torch.uint8), "segmentation", 1, str(tmp_path))
    assert told == {"iou": 1.0}
    coloured = maps.clone()
    coloured[:, 0] += 1
    with pytest.raises(InputError, match="colours"):
        following([[picture]], coloured, coloured[:, :3], "segmentation", 1, str(tmp_path))


@pytest.mark.slow
def test_drift_is_of_prior_prompts_and_folders(base: DiffusionBase, photos: Path, dino_folder: Path, tmp_path: Path):
    for file in photos.iterdir():
        file.with_suffix(".txt").write_text(f"a toy {file.stem}")
    settings = EvaluationConfig(path=str(photos), dino=str(dino_folder), seeds=1, steps=1, colours=("red",),
                                guidance=1.0, prior_prompts=("a cat", "a toy", "the red cat"))  # fmt: skip
    card = Card(
        "textual_inversion", {"token": "<cat>", "vectors": 1}, "diffusion", base.name, base.hash, trigger="<cat>"
    )
    word = Adapter({"embedding": torch.ones(1, 16)}, card)
    plain, figures = evaluate(base, None, settings), evaluate(base, word, settings)
    assert plain["drift"] == pytest.approx(figures["drift"])  # prompts without the word: the base draws them as before
    assert plain["dino_similarity"] != figures["dino_similarity"] and "image_similarity" not in plain
    folder = evaluate(base, None, replace(settings, prior_prompts=(), prior_path=str(photos)))
    eye = Eye(str(dino_folder))
    drawn = draw(base, [f"a toy {i}" for i in range(5)], [0], settings.drawing)
    real = [Image.open(photos / f"{i}.png") for i in range(5)]
    middle = [each.resize((224, 224), Image.Resampling.BICUBIC, box=(4, 0, 20, 16), reducing_gap=3.0) for each in real]
    assert folder["kid"] == pytest.approx(1000 * kid(eye.images(sum(drawn, [])), eye.images(middle)))
    with pytest.raises(InputError, match="eval.dino"):
        evaluate(base, None, replace(settings, dino=""))
    with pytest.raises(InputError, match="no drift"):
        evaluate(base, None, replace(settings, prior_prompts=("a cat",)))


def test_pictures_are_looked_at_as_they_were_trained_on(base: DiffusionBase, folder: Path, tmp_path: Path):
    """At the resolution of the job, on its background, with its captions; previews too."""
    cut = tmp_path / "cut"
    cut.mkdir()
    Image.new("RGBA", (24, 24), (255, 0, 0, 0)).save(cut / "0.png")
    data = {"path": str(cut), "resolution": 16, "background": "black", "caption": "a {token} on black"}
    job = Job.load({"base": str(folder), "method": {"name": "lora"}, "data": data, "train": {"device": "cpu"}})
    told = measured_on(job)
    assert (told["resolution"], told["laid_on"], told["caption"]) == (16, "black", "a {token} on black")
    assert measured_on(replace(job, eval={"resolution": 8}))["resolution"] == 8
    settings = EvaluationConfig(**told)
    assert settings.drawing.resolution == 16
    assert np.asarray(real_pictures(settings.data, 0.0)[0]).max() == 0
    assert load_dataset(settings.data, 8, Cache()).pictures[0].caption == "a {token} on black"
    adapter = prepare(job).adapter({})
    assert evaluation_settings(adapter, None, str(cut)) == {"path": str(cut), "held_out": 0.0, "resolution": 16}
    files = preview(base, adapter, ["a sks"], [0], tmp_path / "as", PreviewConfig(steps=1))
    assert Image.open(files[-1]).size == (16, 16)
    files = preview(base, adapter, ["a sks"], [0], tmp_path / "other", PreviewConfig(steps=1, resolution=8))
    assert Image.open(files[-1]).size == (8, 8)


@pytest.mark.slow
def test_a_controlnet_is_measured_by_its_maps(base: DiffusionBase, folder: Path, photos: Path, clip_folder: Path):
    for file in photos.iterdir():
        file.with_suffix(".txt").write_text("a toy")
    job = {"base": str(folder), "method": {"name": "controlnet", "condition": "canny"}, "data": {"path": str(photos)}}
    adapter = prepare(Job.load(job | {"train": {"device": "cpu"}})).adapter({})
    told = evaluation_settings(adapter, None, str(photos))
    assert told == {"path": str(photos), "held_out": 0.0, "condition": "canny"}
    settings = EvaluationConfig(**told, clip=str(clip_folder), seeds=1, steps=1)
    figures = {"base": evaluate(base, None, settings), "adapter": evaluate(base, adapter, settings)}
    names = {"edge_precision", "edge_recall", "edge_f1", "text_alignment", "validation_loss"}
    assert set(figures["base"]) == set(figures["adapter"]) == names
    assert figures["base"]["validation_loss"] == pytest.approx(figures["adapter"]["validation_loss"])  # starts at zero


def test_the_loss_at_fixed_noise_is_that_of_its_formula(base: DiffusionBase, photos: Path):
    """Written out: the same draws, the scheduler of diffusers, and the plain mean over pictures and rounds."""
    dataset = load_dataset(DataConfig(path=str(photos)), 8, Cache())
    found = drawing_loss(base, None, dataset, "cat")
    assert found == drawing_loss(base, None, dataset, "cat") != drawing_loss(base, None, dataset, "toy")
    posterior, losses = latents(base, dataset, Cache()), []
    text = base.encode(base.tokenize(["a photo of cat"]))
    for number in range(ROWS // 5):
        generator = torch.Generator().manual_seed(number)
        picks = torch.randperm(5, generator=generator)
        torch.randint(1, (5,), generator=generator), torch.rand((), generator=generator)
        redraw, noise = torch.randn(2, 5, 4, 4, 4, generator=generator)
        x0 = posterior["mean"][picks, 0] + posterior["std"][picks, 0] * redraw
        levels = objective_for(base.pipe.scheduler, None, 0).levels(5, generator)
        noisy = base.pipe.scheduler.add_noise(x0, noise, levels.long())
        with torch.no_grad():
            answer = base.denoiser(noisy, levels.long(), encoder_hidden_states=text.expand(5, -1, -1)).sample
        losses.append(float((answer - noise).square().mean()))
    assert found == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_share_is_held_out_by_the_bytes_of_pictures(photos: Path, tmp_path: Path):
    def names(share: float) -> set[str]:
        pictures = load_dataset(DataConfig(path=str(photos)), 8, Cache()).pictures
        return {pictures[place].digest for place in held_out(pictures, share)}

    before = names(0.4)
    assert len(before) == 2 and names(0.01) < before and len(names(0.99)) == 4
    (photos / "0.png").rename(photos / "9.png")
    assert names(0.4) == before
    for i in (1, 2, 3, 4):
        (photos / f"{i}.png").unlink()
    with pytest.raises(InputError, match="none to hold out"):
        names(0.5)


def test_the_score_is_relative_to_real_pictures_and_the_base(base: DiffusionBase, photos: Path, clip_folder: Path):
    settings = EvaluationConfig(path=str(photos), clip=str(clip_folder), seeds=1, steps=1, colours=("red", "blue"))
    yardstick = Yardstick(base, settings)
    plain = yardstick.score("thing", partial(draw, base, config=settings.drawing))
    assert plain["alignment"] == pytest.approx(1)  # the base itself
    real = Clip(str(clip_folder)).images(real_pictures(DataConfig(path=str(photos)), 0.0))
    among = [float(real[i] @ real[j]) for i in range(5) for j in range(5) if i != j]
    assert plain["fidelity"] == pytest.approx(plain["image_similarity"] / np.mean(among), rel=1e-4)
    a, b = plain["fidelity"], plain["alignment"]
    assert plain["score"] == pytest.approx(2 * a * b / (a + b))
    with pytest.raises(InputError, match="none is named"):
        Yardstick(base, replace(settings, clip=""))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "figure"), [("canny", "edge_f1"), ("soft_edge", "map_error")])
def test_a_controlnet_is_measured_on_the_way(
    base: DiffusionBase, folder: Path, photos: Path, clip_folder: Path, tmp_path: Path, kind: str, figure: str
):
    """The score of the result is that of its own figures, and the figures are those of `evaluate` on the saved file."""
    for file in sorted(photos.glob("*.png")):
        file.with_suffix(".txt").write_text("a toy")
    settings: dict[str, Any] = {"clip": str(clip_folder), "seeds": 1, "steps": 1}
    train = {"steps": 2, "device": "cpu", "threads": 1, "learning_rate": 0.01, "measure_every": 1, "keep": "best"}
    job = {"base": str(folder), "method": {"name": "controlnet", "condition": kind}, "data": {"path": str(photos)},
           "train": train, "eval": settings}  # fmt: skip
    run = graft.train(job, run_dir=tmp_path / "run")
    rows = {row["step"]: row for row in run.metrics()}
    adapter = run.adapter()
    row = rows[adapter.card.metrics["steps"]]
    again = evaluate(base, adapter, EvaluationConfig(path=str(photos), condition=kind, **settings))
    plain = evaluate(base, None, EvaluationConfig(path=str(photos), condition=kind, **settings))
    assert row[figure] == pytest.approx(again[figure], abs=1e-4)
    assert row["fidelity"] == pytest.approx(again[figure] if kind == "canny" else 1 - again[figure], abs=1e-4)
    assert row["alignment"] == pytest.approx(again["text_alignment"] / plain["text_alignment"], rel=1e-3)
    assert row["score"] == max(each["score"] for each in rows.values())


def test_followers_are_scored_and_show_samples_as_before(base: DiffusionBase, photos: Path, clip_folder: Path):
    """Without a caption or a CLIP there is fidelity alone; what an IP-Adapter shows is taken away again."""
    settings = EvaluationConfig(path=str(photos), condition="canny", seeds=1, steps=1)
    yardstick = FollowerYardstick(base, settings)
    handle = ControlNet().attach(base)
    handle.maps = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    found = yardstick.score(handle)
    assert found["score"] == found["fidelity"] == found["edge_f1"] and "alignment" not in found
    assert handle.maps.shape == (1, 1, 8, 8)
    handle.detach()
    with pytest.raises(InputError, match="nothing here reads such a map"):
        FollowerYardstick(base, replace(settings, condition="pose", path=str(_with_maps(photos))))
    with pytest.raises(InputError, match="none is named"):
        FollowerYardstick(base, replace(settings, condition=""))
    seen: list[int] = []
    shown = SimpleNamespace(show=lambda rows: seen.append(len(rows)))
    pictures = FollowerYardstick(base, replace(settings, condition="", clip=str(clip_folder)))
    found = pictures.score(shown)
    assert seen == [1, 1, 1, 1, 0] and found["fidelity"] == found["image_similarity"]
    assert found["alignment"] == pytest.approx(1)  # it changed nothing


def _with_maps(photos: Path) -> Path:
    (photos / "conditions").mkdir()
    for file in sorted(photos.glob("*.png")):
        (photos / "conditions" / file.name).write_bytes(file.read_bytes())
    return photos


@pytest.mark.slow
def test_the_pair_chooses_the_step_that_becomes_the_result(
    base: DiffusionBase, folder: Path, photos: Path, clip_folder: Path, tmp_path: Path
):
    """The score of the result is that of the saved file, drawn anew."""
    settings = {"clip": str(clip_folder), "seeds": 1, "steps": 1, "colours": ["red"]}
    train = {"steps": 3, "device": "cpu", "threads": 1, "learning_rate": 0.3, "measure_every": 1, "keep": "best"}
    job = {"base": str(folder), "method": {"name": "lora", "rank": 2}, "data": {"path": str(photos)},
           "train": train, "eval": settings}  # fmt: skip
    run = graft.train(job, run_dir=tmp_path / "run")
    scores = {row["step"]: row["score"] for row in run.metrics()}
    adapter = run.adapter()
    best = max(scores, key=lambda step: scores[step])
    assert list(scores) == [1, 2, 3] and adapter.card.metrics["steps"] == best
    yardstick = Yardstick(base, from_dict(EvaluationConfig, settings | {"path": str(photos)}, "eval"))
    with adapter.attached(base):
        again = yardstick.score(adapter.card.trigger or "", partial(draw, base, config=yardstick.drawing))
    assert again["score"] == pytest.approx(scores[best], rel=1e-2)
    for wrong, said in (
        (job | {"eval": {}}, "eval.clip"),
        (job | {"method": {"name": "controlnet", "condition": "pose"}}, "there is no conditions/"),
        (job | {"eval": {"clips": 1}}, "eval.clips"),
    ):
        with pytest.raises(InputError, match=said):
            graft.train(wrong, run_dir=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
