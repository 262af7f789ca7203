"""T2I-Adapter, against diffusers' own classes and the paper's formula."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, MultiAdapter, StableDiffusionAdapterPipeline, StableDiffusionXLAdapterPipeline
from diffusers import T2IAdapter as Network
from PIL import Image

import graft
from graft.diffusion.base import DiffusionBase, load_base
from graft.diffusion.jobs import prepare
from graft.diffusion.previews import PreviewConfig, draw, preview
from graft.diffusion.t2i_adapter import T2IAdapter, shape
from graft.studio.adapter import Adapter
from graft.studio.cli import main
from graft.studio.errors import InputError
from graft.studio.job import Job

SETTINGS = {"height": 8, "width": 8, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
SD1 = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
XL = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")


def job(folder: Path, photos: Path, method: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    settings = {"steps": 2, "batch_size": 3, "threads": 1, "device": "cpu", "mixed_precision": "no", **train}
    method = {"name": "t2i_adapter", "condition": "map", **(method or {})}
    return {"base": str(folder), "method": method, "data": {"path": str(photos)}, "train": settings}


def trained(folder: Path, photos: Path, **method: Any) -> Any:
    task = prepare(Job.load(job(folder, photos, method)))
    optimizer = torch.optim.AdamW(task.param_groups(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        task(task.batch(step, torch.Generator().manual_seed(step)))[0].backward()
        assert all(p.grad is not None for p in task.parameters())
        optimizer.step()
    return task


def a_map(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def bytes_of(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("blocks", "widths", "kind", "millions"),
    [(SD1, (320, 640, 1280, 1280), "full_adapter", 77.4), (XL, (320, 640, 1280), "full_adapter_xl", 79.0)],
)
def test_its_size_is_the_authors(blocks: tuple[str, ...], widths: tuple[int, ...], kind: str, millions: float):
    config = {"down_block_types": blocks, "block_out_channels": widths}
    denoiser = SimpleNamespace(config=SimpleNamespace(get=config.get, block_out_channels=widths))
    base: Any = SimpleNamespace(name="base", denoiser=denoiser, pipe=SimpleNamespace(vae_scale_factor=8))
    found = shape(base)
    assert found["adapter_type"] == kind and found["channels"] == [320, 640, 1280, 1280]
    with torch.device("meta"):
        network = Network(**found)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


def test_the_loss_is_the_papers(folder: Path, mapped: Path):
    task = trained(folder, mapped, scale=0.6)
    batch, pipe = task.batch(7, torch.Generator().manual_seed(7)), task.base.pipe
    network = Network.from_config(task.handle.details["t2i_adapter"])
    network.load_state_dict(task.bank.state_dict())
    latents = batch.mean + batch.std * batch.redraw
    noisy = pipe.scheduler.add_noise(latents, batch.noise, batch.levels)
    text = pipe.encode_prompt([["", "a red cat", "the blue toy"][i] for i in batch.prompts[batch.prompt_of]],
                              "cpu", 1, False)[0]  # fmt: skip
    features = [0.6 * feature for feature in network(batch.extras["control"] / 255)]
    noise = pipe.unet(noisy, batch.levels, text, down_intrablock_additional_residuals=features).sample
    torch.testing.assert_close(task(batch)[0], (noise - batch.noise).square().mean(), rtol=1e-5, atol=1e-6)
    assert not [name for name, p in task.base.denoiser.named_parameters() if p.requires_grad]


def test_stock_diffusers_draws_the_same_from_the_export(folder: Path, mapped: Path, tmp_path: Path):
    adapter = trained(folder, mapped).adapter({"loss": 1.0})
    adapter.save(tmp_path / "native")
    adapter.export(tmp_path / "diffusers", "diffusers")
    theirs = Network.from_pretrained(tmp_path / "diffusers")
    assert all(torch.equal(tensor, adapter.tensors[name]) for name, tensor in theirs.state_dict().items())
    pipe = StableDiffusionAdapterPipeline.from_pretrained(folder, adapter=theirs, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe("a red cat", a_map(), generator=torch.Generator().manual_seed(5), **SETTINGS).images[0]
    base = load_base(str(folder), "cpu")
    plain = base.pipe("a red cat", generator=torch.Generator().manual_seed(5), **SETTINGS).images[0]
    calls: list[Any] = []
    with Adapter.load(tmp_path / "native").attached(base) as handle:
        handle.bank.register_forward_hook(lambda *_: calls.append(1))
        handle.follow(bytes_of(a_map()))
        ours = base.pipe("a red cat", generator=torch.Generator().manual_seed(5), **SETTINGS).images[0]
    again = base.pipe("a red cat", generator=torch.Generator().manual_seed(5), **SETTINGS).images[0]
    np.testing.assert_allclose(ours, stock, atol=1e-6)
    assert np.abs(ours - plain).max() > 1e-3 and np.array_equal(again, plain)
    assert len(calls) == 1  # three steps, with guidance
    resumed = T2IAdapter(condition="map", init=str(tmp_path / "diffusers")).attach(base)
    assert all(torch.equal(tensor, adapter.tensors[name]) for name, tensor in resumed.tensors().items())
    resumed.detach()
    with pytest.raises(InputError, match="use native, diffusers"):
        adapter.export(tmp_path, "kohya")
    Network(channels=[16, 64], downscale_factor=2).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"its channels is \[16, 64\], .* needs \[16, 32\]"):
        T2IAdapter(init=str(tmp_path / "other")).attach(base)


@pytest.mark.slow
def test_on_stable_diffusion_xl(xl: Path, mapped: Path, tmp_path: Path):
    adapter = trained(xl, mapped).adapter({})
    assert adapter.card.details["t2i_adapter"]["adapter_type"] == "full_adapter_xl"
    adapter.export(tmp_path, "diffusers")
    settings = {**SETTINGS, "num_inference_steps": 2}
    stock = StableDiffusionXLAdapterPipeline.from_pretrained(xl, adapter=Network.from_pretrained(tmp_path))
    stock.set_progress_bar_config(disable=True)
    theirs = stock("a red cat", image=a_map(), generator=torch.Generator().manual_seed(5), **settings).images[0]
    base = load_base(str(xl), "cpu")
    plain = base.pipe("a red cat", generator=torch.Generator().manual_seed(5), **settings).images[0]
    with adapter.attached(base) as handle:
        handle.follow(bytes_of(a_map()))
        ours = base.pipe("a red cat", generator=torch.Generator().manual_seed(5), **settings).images[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours - plain).max() > 1e-3


@pytest.mark.slow
def test_several_are_weighted_as_in_diffusers_from_the_command_line(folder: Path, mapped: Path, tmp_path: Path):
    paths = []
    for i in range(2):
        a_map(i).save(tmp_path / f"{i}.png")
        adapter = trained(folder, mapped, scale=1.0, empty_prompts=0.1 * i).adapter({})
        adapter.save(tmp_path / f"native{i}")
        adapter.export(tmp_path / f"net{i}", "diffusers")
        paths.append(tmp_path / f"{i}.png")
    options = ["--device", "cpu", "--seed", "5", "--prompt", "a red cat", "--out", str(tmp_path / "out")]
    sets = {
        "steps": 3, "guidance": 3.0, "ready": "true", "beside": tmp_path / "native1",
        "condition": f'["{paths[0]}", "{paths[1]}"]', "weights": "[0.5, 0.8]",
    }  # fmt: skip
    options += [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
    assert main(["preview", str(tmp_path / "native0"), *options]) == 0
    networks = MultiAdapter([Network.from_pretrained(tmp_path / f"net{i}") for i in range(2)])
    pipe = StableDiffusionAdapterPipeline.from_pretrained(folder, adapter=networks, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        "a red cat", [a_map(0), a_map(1)], adapter_conditioning_scale=[0.5, 0.8],
        generator=torch.Generator().manual_seed(5), **{**SETTINGS, "output_type": "pil"},
    ).images[0]  # fmt: skip
    ours = np.asarray(Image.open(tmp_path / "out" / "with-0-seed5.png")).astype(int)
    assert np.abs(ours - np.asarray(stock)).max() <= 1


@pytest.mark.slow
def test_one_beside_a_controlnet_adds_up(folder: Path, mapped: Path, base: DiffusionBase, tmp_path: Path):
    adapter = trained(folder, mapped).adapter({})
    control = prepare(Job.load(job(folder, mapped, {"name": "controlnet"}))).handle.bank
    torch.nn.init.normal_(control.controlnet_mid_block.weight)
    control.save_pretrained(tmp_path / "control")
    ours = graft.diffusion.ControlNet(condition="map", init=str(tmp_path / "control")).attach(base)
    ours.follow(bytes_of(a_map(1)))
    config = PreviewConfig(steps=1, guidance=1.0)
    with adapter.attached(base) as handle:
        handle.follow(bytes_of(a_map(0)))
        both = draw(base, ["a red cat"], [5], config)[0][0]
        noisy, level = torch.randn(1, 4, 4, 4), torch.tensor([500])
        text = base.condition(base.tokenize(["a red cat"]))
        with torch.no_grad():
            found = base.denoise(noisy, level, text)
            down, mid = ControlNetModel.from_pretrained(tmp_path / "control")(
                noisy, level, text["text"], bytes_of(a_map(1)) / 255, return_dict=False
            )
            features, lead = handle.bank(bytes_of(a_map(0)) / 255), handle._hook
            lead.remove()
            ours._hook.remove()
            expected = base.pipe.unet(
                noisy, level, text["text"], down_block_additional_residuals=down, mid_block_additional_residual=mid,
                down_intrablock_additional_residuals=features,
            ).sample  # fmt: skip
    torch.testing.assert_close(found, expected)
    assert both.tobytes() != draw(base, ["a red cat"], [5], config)[0][0].tobytes()


@pytest.mark.slow
def test_through_the_loop_with_samples(folder: Path, mapped: Path, tmp_path: Path):
    settings = job(folder, mapped, {"condition": "canny"}, steps=2) | {
        "sample": {"every": 2, "steps": 1, "seeds": [0]}
    }  # fmt: skip
    run = graft.train(settings, run_dir=tmp_path / "run")
    assert Image.open(run.folder / "samples" / "step-000002.png").size[0] == 4 * 8 + 3 * 128
    assert run.adapter().card.details["t2i_adapter"]["channels"] == [16, 32]
    files = preview(load_base(str(folder), "cpu"), run.adapter(), ["a cat"], [0], tmp_path / "out",
                    PreviewConfig(steps=1, condition=str(mapped / "0.png")))  # fmt: skip
    assert [file.name for file in files[:2]] == ["grid.png", "condition-0-seed0.png"]


def test_wrong_settings_are_refused(base: DiffusionBase):
    with pytest.raises(InputError, match='"cubic" or "uniform"'):
        T2IAdapter(levels="square")
    flat: Any = SimpleNamespace(name="flat", denoiser=SimpleNamespace(config={}), pipe=base.pipe)
    with pytest.raises(InputError, match="flat: its denoiser has no encoder"):
        shape(flat)
