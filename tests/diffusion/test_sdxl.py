"""Stable Diffusion XL: two text encoders, and a denoiser that is told sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline
from PIL import Image

from graft.diffusion.base import SDXLBase, load_base
from graft.diffusion.jobs import prepare
from graft.studio.adapter import load_adapter
from graft.studio.job import Job


def job(xl: Path, photos: Path, **method) -> Job:
    method = {"name": "lora", "rank": 2, "targets": "all-linear"} | method
    data = {"path": str(photos)}
    return Job.load({"base": str(xl), "method": method, "data": data, "train": {"batch_size": 2, "device": "cpu"}})


def test_the_denoiser_is_told_what_the_pipeline_tells_it(xl: Path):
    base = load_base(str(xl), "cpu")
    assert isinstance(base, SDXLBase)
    prompts = ["a photo of a red cat", "a toy"]
    text, _, pooled, _ = base.pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    told = base.condition(base.tokenize(prompts))
    torch.testing.assert_close(told["text"], text)
    torch.testing.assert_close(told["pooled"], pooled)
    noisy, levels = torch.randn(2, 4, 4, 4), torch.tensor([3, 500])
    sizes = torch.tensor([8.0, 8, 0, 0, 8, 8]).repeat(2, 1)
    added = {"text_embeds": pooled, "time_ids": sizes}
    expected = base.pipe.unet(noisy, levels, text, added_cond_kwargs=added).sample
    torch.testing.assert_close(base.denoise(noisy, levels, told), expected)


@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_lora_trains_and_stock_diffusers_draws_the_same(xl: Path, photos: Path, tmp_path: Path, text_encoder: bool):
    # The encoders' last layers do not reach the pictures (the second one's do, through its pooled output).
    living = r"unet\..*attn.*\.to_[qkv]|text_encoder\..*layers\.0.*(q|v)_proj|text_encoder_2\..*(q|v)_proj"
    targets = living if text_encoder else "all-linear"
    task = prepare(job(xl, photos, targets=targets, text_encoder=text_encoder))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        task(task.batch(step, torch.Generator().manual_seed(step)))[0].backward()
        optimizer.step()
    adapter = task.adapter({})
    adapter.export(tmp_path, "diffusers")
    stock = StableDiffusionXLPipeline.from_pretrained(xl, add_watermarker=False)
    plain = picture(stock)
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert np.abs(plain - picture(task.base.pipe)).max() > 1e-4
    np.testing.assert_allclose(picture(stock), picture(task.base.pipe), atol=1e-5)
    fresh = load_base(str(xl), "cpu")
    with load_adapter(tmp_path).attached(fresh):  # a file that names no base is tried first
        np.testing.assert_allclose(picture(fresh.pipe), picture(stock), atol=1e-5)


@pytest.mark.slow
def test_a_controlnet_trains_and_stock_diffusers_draws_the_same(xl: Path, photos: Path, tmp_path: Path):
    (photos / "conditions").mkdir()
    for path in sorted(photos.glob("*.png")):
        (photos / "conditions" / path.name).write_bytes(path.read_bytes())
    method, train = {"name": "controlnet", "condition": "map"}, {"batch_size": 2, "device": "cpu"}
    task = prepare(Job.load({"base": str(xl), "method": method, "data": {"path": str(photos)}, "train": train}))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        task(task.batch(step, torch.Generator().manual_seed(step)))[0].backward()
        optimizer.step()
    assert all(p.grad is not None for p in task.parameters())
    adapter = task.adapter({})
    adapter.export(tmp_path, "diffusers")
    network, shown = ControlNetModel.from_pretrained(tmp_path), Image.new("RGB", (8, 8), "red")
    stock = StableDiffusionXLControlNetPipeline.from_pretrained(xl, controlnet=network, add_watermarker=False)
    base = load_base(str(xl), "cpu")
    plain = picture(base.pipe)
    with adapter.attached(base) as control:
        control.follow(torch.from_numpy(np.asarray(shown).copy()).permute(2, 0, 1)[None])
        ours = picture(base.pipe)
    np.testing.assert_allclose(picture(stock, image=shown), ours, atol=1e-5)
    assert np.abs(ours - plain).max() > 1e-3


def picture(pipe, prompt: str = "a photo of sks", **more) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(11)
    settings = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "np", **more}
    return pipe(prompt, generator=generator, **settings).images[0]
