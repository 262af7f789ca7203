"""The embedded models as the libraries they are for load them."""

import pytest
import torch

from graft.studio.errors import InputError
from graft.studio.pocket import models
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.commands import install_network, list_models
from graft.studio.pocket.tokenizer import LENGTH

OUTSIDER = """
import json, sys, torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer, CLIPImageProcessor
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = pipe("red apple", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
clip = CLIPModel.from_pretrained(sys.argv[2])
tokens = CLIPTokenizer.from_pretrained(sys.argv[2])(["red apple", "ghost"], padding=True, return_tensors="pt")
pixels = CLIPImageProcessor.from_pretrained(sys.argv[2])(image[0], do_rescale=False, return_tensors="pt").pixel_values
logits = clip(pixel_values=pixels, **tokens).logits_per_image
print(json.dumps({"size": image.shape, "mean": float(image.mean()), "logits": logits.tolist()}))
"""

OUTSIDER_VISION = """
import json, sys, timm, torch, open_clip
clip, prepare = open_clip.create_model_from_pretrained("local-dir:" + sys.argv[1])
tokens = open_clip.get_tokenizer("local-dir:" + sys.argv[1])(["red apple", "ghost"])
pixels = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
image, text, scale = clip.eval()(pixels, tokens)
vit = timm.create_model("local-dir:" + sys.argv[2], pretrained=True).eval()
path = sys.argv[2] + "/model.safetensors"
other = timm.create_model(vit.pretrained_cfg["architecture"], checkpoint_path=path, img_size=64, patch_size=8,
                          embed_dim=160, depth=6, num_heads=5, num_classes=900).eval()
assert torch.equal(vit(pixels), other(pixels))
means = [float(m) for t in prepare.transforms if hasattr(t, "mean") for m in t.mean]
print(json.dumps({"clip": (scale * image @ text.T).tolist(), "vit": vit(pixels).tolist(), "means": means,
                  "tokens": list(tokens.shape), "names": vit.pretrained_cfg["label_names"]}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    return {name: models.export(name, root / name) for name in (row["name"] for row in list_models() if row["present"])}


def test_outsider_gets_the_same_outputs(folders, outsider):
    """A program with diffusers and transformers only."""
    theirs = outsider(OUTSIDER, folders["pocket-sd"], folders["pocket-clip"])
    pipe = models.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    ours = pipe("red apple", num_inference_steps=4, generator=noise, output_type="np").images
    assert theirs["size"] == [1, 64, 64, 3]
    assert theirs["mean"] == pytest.approx(float(ours.mean()), abs=1e-5)

    clip, tokens = models.clip(), models.load_tokenizer()(["red apple", "ghost"], padding=True, return_tensors="pt")
    pixels = torch.from_numpy(ours).permute(0, 3, 1, 2).float() * 2 - 1
    with torch.no_grad():
        logits = clip(pixel_values=pixels, **tokens).logits_per_image
    assert torch.tensor(theirs["logits"]) == pytest.approx(logits, abs=1e-3)


def test_outsider_with_open_clip_and_timm_gets_the_same_outputs(folders, outsider):
    theirs = outsider(OUTSIDER_VISION, folders["pocket-clip"], folders["pocket-vit"])
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    tokens = models.load_tokenizer()(["red apple", "ghost"], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        logits = models.clip()(pixel_values=pixels, **tokens).logits_per_image
        classes = models.vit()(pixels)
    assert torch.tensor(theirs["clip"]) == pytest.approx(logits, abs=1e-3)
    assert torch.tensor(theirs["vit"]) == pytest.approx(classes, abs=1e-4)
    assert theirs["means"] == [0.5, 0.5, 0.5]
    assert theirs["tokens"] == [2, LENGTH]
    atlas = Atlas.load()
    assert theirs["names"] == [atlas.names[i] for i in atlas.known]


def test_pocket_sd_speaks_with_the_text_tower_of_pocket_clip():
    tower, clip = models.text_encoder().state_dict(), models.clip().text_model.state_dict()
    assert tower.keys() == clip.keys()
    assert all(torch.equal(tower[key], clip[key]) for key in tower)


def test_files_are_small_enough():
    sizes = [path.stat().st_size for path in models.WEIGHTS.glob("*.safetensors")]
    assert max(sizes) <= 14e6
    assert sum(sizes) <= 32e6


def test_parameter_counts_are_those_of_the_files():
    for name in ("autoencoder", "clip", "vit", "unet"):
        network = getattr(models, name)()
        assert models.facts(name)["parameters"] == sum(v.numel() for v in network.state_dict().values())


def test_resolve_writes_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    first = models.resolve("pocket-clip")
    stamp = (first / "config.json").stat().st_mtime_ns
    assert models.resolve("pocket-clip") == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    assert not list(first.parent.glob(".*")), "a draft was left"


def test_export_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="not an empty folder"):
        models.export("pocket-clip", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_unknown_model_is_refused():
    with pytest.raises(InputError, match="pocket-sd"):
        models.resolve("pocket-xl")


def test_list_tells_what_is_there():
    rows = {row["name"]: row for row in list_models()}
    assert rows["pocket-sd"]["present"]
    assert rows["pocket-sd"]["hash"] == models.weights_hash("pocket-sd")


def test_a_training_that_went_on_counts_with_those_before(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "WEIGHTS", tmp_path)
    weights = {"w": torch.zeros(3)}
    install_network("vit", weights, {"steps": 5, "seconds": 1.0})
    install_network("vit", weights, {"steps": 7, "seconds": 2.0}, went_on=True)
    facts = models.facts("vit")
    assert [one["steps"] for one in facts["trainings"]] == [5, 7]
    assert facts["parameters"] == 3
    install_network("vit", weights, {"steps": 9, "seconds": 2.0})
    assert [one["steps"] for one in models.facts("vit")["trainings"]] == [9]
