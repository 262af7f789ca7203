"""ControlNet, against diffusers' own classes and the paper's formula."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from PIL import Image

import graft
from graft.diffusion.base import DiffusionBase, load_base
from graft.diffusion.bench.control import checks, followed, outlines, table, write_scenes
from graft.diffusion.bench.control_speed import compared
from graft.diffusion.conditions import condition_maps, hint, maps_of_files, picture_of
from graft.diffusion.controlnet import ControlNet, start
from graft.diffusion.data import DataConfig, load_dataset
from graft.diffusion.jobs import prepare, prepare_together
from graft.diffusion.previews import PreviewConfig, draw, preview
from graft.studio.adapter import Adapter
from graft.studio.caches import Cache
from graft.studio.cli import main
from graft.studio.errors import DataError, FormatError, InputError
from graft.studio.job import Job
from graft.studio.training import resume

DEPTH = {"name": "controlnet", "condition": "depth"}


def job(folder: Path, photos: Path, method: dict | None = None, **train) -> dict:
    settings = {"steps": 4, "batch_size": 3, "threads": 1, "device": "cpu", "mixed_precision": "no", **train}
    return {"base": str(folder), "method": method or DEPTH, "data": {"path": str(photos)}, "train": settings}


def steps(task, count: int = 3, start: int = 0, rate: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW(task.param_groups(), lr=rate)
    losses = []
    for step in range(start, count):
        optimizer.zero_grad()
        loss, _ = task(task.batch(step, torch.Generator().manual_seed(step)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(folder: Path, photos: Path, method: dict | None = None):
    task = prepare(Job.load(job(folder, photos, method)))
    steps(task, 4)
    return task


def test_the_trained_tensors_are_diffusers_own():
    """Names and counts of Stable Diffusion 1.5, 361.3 M with 13 zero convolutions, without their memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        network = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    zeros = [name for name, _ in network.named_modules() if name.startswith("controlnet_")]
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 361.3
    zeros = [name for name in zeros if name == "controlnet_mid_block" or name.count(".") == 1 and "down" in name]
    assert len(zeros) == 13


def test_only_the_copy_is_trained(folder: Path, mapped: Path, base: DiffusionBase):
    task = prepare(Job.load(job(folder, mapped)))
    theirs = ControlNetModel.from_unet(base.denoiser, conditioning_embedding_out_channels=(16, 32))
    assert {n: p.shape for n, p in task.bank.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert not [n for n, p in task.base.denoiser.named_parameters() if p.requires_grad]
    before = {name: p.clone() for name, p in task.bank.named_parameters()}
    digest = graft.studio.adapter.base_hash(task.base.modules)
    steps(task, 3)
    assert [name for name, p in task.bank.named_parameters() if torch.equal(before[name], p)] == []
    assert graft.studio.adapter.base_hash(task.base.modules) == digest


def test_it_starts_at_the_base_bit_for_bit_and_leaves_no_trace(base: DiffusionBase):
    config, maps = PreviewConfig(steps=2), torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    plain = draw(base, ["a red cat"], [3], config)[0][0].tobytes()
    handle = ControlNet().attach(base)
    handle.follow(maps)
    assert draw(base, ["a red cat"], [3], config)[0][0].tobytes() == plain
    torch.nn.init.ones_(handle.bank.controlnet_mid_block.weight)
    assert draw(base, ["a red cat"], [3], config)[0][0].tobytes() != plain
    handle.detach()
    assert draw(base, ["a red cat"], [3], config)[0][0].tobytes() == plain
    assert not base.choosers and not base.denoiser._forward_pre_hooks


def test_the_maps_encoder_starts_so_that_it_tells_maps_apart():
    """Behind seven convolutions of diffusers' start hardly anything of two maps' difference is left."""
    torch.manual_seed(0)
    encoder = ControlNetConditioningEmbedding(64, block_out_channels=(16, 32, 96, 256))
    maps = (torch.rand(2, 1, 64, 64) < 0.1).float().expand(-1, 3, -1, -1)

    @torch.no_grad()
    def apart() -> float:
        x = torch.nn.functional.silu(encoder.conv_in(maps))
        for layer in encoder.blocks:
            x = torch.nn.functional.silu(layer(x))
        return float((x[0] - x[1]).std() / (maps[0] - maps[1]).std())

    theirs = apart()
    start(encoder)
    assert theirs < 0.01 and apart() > 0.1 and not encoder(maps).any()


def test_scenes_of_the_bench_have_their_outlines_beside_them(tmp_path: Path):
    """Written out with OpenCV: grey, blurred, Canny; far fewer than the edges of the picture itself."""
    folder = write_scenes(tmp_path / "scenes", 6)
    maps = condition_maps(
        load_dataset(DataConfig(path=str(folder)), 64, Cache()), DataConfig(path=str(folder)), "map", Cache()
    )
    fine = 0
    for k in range(6):
        picture = np.asarray(Image.open(folder / f"{k:05d}.png"))
        blurred = cv2.GaussianBlur(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), (0, 0), 2.5)
        assert np.array_equal(maps[k, 0, 0], cv2.Canny(blurred, 40, 80))
        assert np.array_equal(outlines(picture), maps[k, 0, 0])
        fine += int((cv2.Canny(picture, 100, 200) > 0).sum())
    assert 0 < (maps > 0).sum() < fine
    pictures = [pixels for pixels, _ in followed(40)]
    assert len(pictures) == 40 and all(outlines(pixels).any() for pixels in pictures)


def test_levels_are_drawn_as_told(folder: Path, mapped: Path):
    """Uniform as in the paper, or cubic: a mean of 1/2 or 3/4 of all levels."""
    for levels, share in (("uniform", 0.5), ("cubic", 0.75)):
        task = prepare(Job.load(job(folder, mapped, {**DEPTH, "levels": levels})))
        found = torch.cat([task.batch(k, torch.Generator().manual_seed(k)).levels for k in range(50)])
        assert float(found.float().mean()) / 1000 == pytest.approx(share, abs=0.02)


def test_the_loss_is_the_papers(folder: Path, mapped: Path):
    scale = 0.6
    task = trained(folder, mapped, {**DEPTH, "scale": scale, "empty_prompts": 0.5})
    batch, pipe = task.batch(7, torch.Generator().manual_seed(7)), task.base.pipe
    copy = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    copy.load_state_dict(task.bank.state_dict())
    latents = batch.mean + batch.std * batch.redraw
    noisy = pipe.scheduler.add_noise(latents, batch.noise, batch.levels)
    prompts = [["", "a red cat", "the blue toy"][i] for i in batch.prompts[batch.prompt_of]]
    text = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    down, mid = copy(noisy, batch.levels, text, batch.extras["control"] / 255, return_dict=False)
    noise = pipe.unet(
        noisy, batch.levels, text, down_block_additional_residuals=[scale * each for each in down],
        mid_block_additional_residual=scale * mid,
    ).sample  # fmt: skip
    torch.testing.assert_close(task(batch)[0], (noise - batch.noise).square().mean(), rtol=1e-5, atol=1e-6)


def test_rows_go_without_their_prompt(folder: Path, mapped: Path):
    task = prepare(Job.load(job(folder, mapped, {**DEPTH, "empty_prompts": 0.25}, batch_size=5)))
    shares = []
    for step in range(100):
        batch = task.batch(step, torch.Generator().manual_seed(step))
        shares.append((batch.prompts[batch.prompt_of] == 0).float().mean())
        assert batch.extras["control"].flatten(1).any(1).all()
    assert float(torch.stack(shares).mean()) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("kind", ["canny", "soft_edge", "scribble"])
def test_maps_are_made_from_the_picture(tmp_path: Path, kind: str):
    pixels = np.full((40, 40, 3), 250, np.uint8)
    pixels[10:30, 10:20] = (20, 60, 20)
    (tmp_path / "one").mkdir()
    Image.fromarray(pixels).save(tmp_path / "one" / "a.png")
    config = DataConfig(path=str(tmp_path / "one"), flip=True, variants=2)
    dataset = load_dataset(config, 40, Cache())
    maps = condition_maps(dataset, config, kind, Cache())
    assert maps.shape == (1, 2, 1, 40, 40) and maps.dtype == torch.uint8
    edge = maps[0, 0, 0]
    assert (
        edge[20, 9:12].max() > 100 and edge[20, 18:22].max() > 100 and not edge[20, 14:16].any() and not edge[:6].any()
    )
    assert int(edge.max()) == 255
    assert hint(maps[0]).shape == (2, 3, 40, 40) and float(hint(maps[0]).max()) == 1


@pytest.mark.parametrize("kind", ["map", "segmentation"])
def test_maps_follow_crop_and_flip(photos: Path, kind: str):
    """A map that is the picture itself becomes, in every variant, what the picture becomes."""
    (photos / "conditions").mkdir()
    for path in photos.glob("*.png"):
        (photos / "conditions" / path.name).write_bytes(path.read_bytes())
    config = DataConfig(path=str(photos), crop="random", flip=True, variants=4, resolution=16)
    dataset = load_dataset(config, 16, Cache())
    assert torch.equal(condition_maps(dataset, config, kind, Cache()), dataset.pixels)
    assert len({variant.numpy().tobytes() for variant in dataset.pixels[0]}) == 4


def test_maps_named_in_the_metadata_are_no_pictures(photos: Path):
    (photos / "maps").mkdir()
    (photos / "0.png").rename(photos / "maps" / "x.png")
    rows = [f'{{"file_name": "{i}.png", "condition": "maps/x.png"}}' for i in range(1, 5)]
    (photos / "metadata.jsonl").write_text("\n".join([*rows[:3], rows[3][:-1] + ', "text": "a cat"}']))
    config = DataConfig(path=str(photos))
    dataset = load_dataset(config, 16, Cache())
    assert [picture.path.name for picture in dataset.pictures] == ["1.png", "2.png", "3.png", "4.png"]
    assert [picture.caption for picture in dataset.pictures] == [None, None, None, "a cat"]
    maps = condition_maps(dataset, config, "depth", Cache())
    assert torch.equal(maps[0], maps[3]) and maps.shape[2] == 3
    digest = dataset.digest
    (photos / "maps" / "x.png").write_bytes((photos / "1.png").read_bytes())
    assert load_dataset(config, 16, Cache()).digest != digest


def test_masks_say_where_the_picture_is_made_anew(photos: Path):
    (photos / "conditions").mkdir()
    mask = np.zeros((16, 24), np.uint8)
    mask[:, :12] = 255
    for path in photos.glob("*.png"):
        Image.fromarray(mask).save(photos / "conditions" / path.name)
    config = DataConfig(path=str(photos))
    dataset = load_dataset(config, 16, Cache())
    shown = hint(condition_maps(dataset, config, "inpaint", Cache())[:, 0])
    assert torch.equal(shown[:, :, :, :8], torch.full((5, 3, 16, 8), -1.0))
    assert torch.equal(shown[:, :, :, 8:], dataset.pixels[:, 0, :, :, 8:] / 255)
    one = maps_of_files(photos / "0.png", "inpaint", 16)
    assert torch.equal(hint(one), shown[:1])
    assert picture_of(one[0]).getpixel((0, 0)) == (128, 128, 128)


def test_bad_maps_are_all_listed_before_anything_is_trained(folder: Path, mapped: Path):
    (mapped / "conditions" / "1.png").unlink()
    Image.new("RGB", (24, 24)).save(mapped / "conditions" / "2.png")
    Image.new("RGB", (24, 16)).save(mapped / "conditions" / "7.png")
    with pytest.raises(DataError) as found:
        prepare(Job.load(job(folder, mapped)))
    for text in ("5 pictures, 4 of them with a depth map", "1.png: there is no conditions/1.png",
                 "its map 2.png is 24 x 24 pixels, the picture 24 x 16",
                 "conditions/7.png: there is no picture of this name", "Put one map of each picture"):  # fmt: skip
        assert text in str(found.value)
    (mapped / "conditions" / "3.png").write_text("no picture")
    with pytest.raises(DataError, match=r"conditions/3\.png: not a picture"):
        prepare(Job.load(job(folder, mapped)))
    (mapped / "metadata.jsonl").write_text('{"file_name": "0.png", "condition": "../x.png"}')
    with pytest.raises(DataError, match="lies outside the folder"):
        load_dataset(DataConfig(path=str(mapped)), 16, Cache())


def test_bad_settings_are_refused(folder: Path, mapped: Path, base: DiffusionBase, tmp_path: Path):
    with pytest.raises(InputError, match=r"method\.condition = 'cany': expected one of canny"):
        ControlNet(condition="cany")
    with pytest.raises(InputError, match=r"method\.empty_prompts = 2"):
        ControlNet(empty_prompts=2)
    with pytest.raises(InputError, match="Train them one by one"):
        prepare_together([Job.load(job(folder, mapped))] * 2)
    with pytest.raises(InputError, match="no ControlNet can be loaded from it"):
        ControlNet(init=str(tmp_path)).attach(base)
    other = UNet2DConditionModel(
        sample_size=4, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, attention_head_dim=8,
    )  # fmt: skip
    ControlNetModel.from_unet(other, conditioning_embedding_out_channels=(16, 32)).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"its block_out_channels is \[8, 8\]"):
        ControlNet(init=str(tmp_path / "other")).attach(base)


def test_stock_diffusers_draws_the_same_from_the_export(folder: Path, mapped: Path, tmp_path: Path):
    task = trained(folder, mapped)
    adapter = task.adapter({"loss": 1.0})
    adapter.save(tmp_path / "native")
    adapter.export(tmp_path / "diffusers", "diffusers")
    theirs = ControlNetModel.from_pretrained(tmp_path / "diffusers")
    assert all(torch.equal(tensor, adapter.tensors[name]) for name, tensor in theirs.state_dict().items())
    pipe = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=theirs, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    shown = Image.open(mapped / "conditions" / "0.png").convert("RGB").crop((4, 0, 20, 16)).resize((8, 8))
    shown.save(tmp_path / "map.png")
    settings = {"height": 8, "width": 8, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    stock = pipe("a red cat", shown, generator=torch.Generator().manual_seed(5), **settings).images[0]
    base = load_base(str(folder), "cpu")
    plain = base.pipe("a red cat", generator=torch.Generator().manual_seed(5), **settings).images[0]
    with Adapter.load(tmp_path / "native").attached(base) as control:
        control.follow_files(tmp_path / "map.png")
        ours = base.pipe("a red cat", generator=torch.Generator().manual_seed(5), **settings).images[0]
    np.testing.assert_allclose(ours, stock, atol=1e-6)
    assert np.abs(ours - plain).max() > 1e-3
    again = ControlNet(condition="depth", init=str(tmp_path / "diffusers")).attach(base)
    assert all(torch.equal(tensor, adapter.tensors[name]) for name, tensor in again.tensors().items())
    again.detach()
    with pytest.raises(InputError, match="use native, diffusers, kohya"):
        adapter.export(tmp_path, "peft")
    with pytest.raises(FormatError, match="controlnet_mid_block"):
        short = {name: t for name, t in adapter.tensors.items() if not name.startswith("controlnet_mid")}
        ControlNet.attach_to(base, short, adapter.card)


@pytest.mark.slow
def test_previews_show_each_prompt_after_its_own_map(folder: Path, mapped: Path, base: DiffusionBase, tmp_path: Path):
    adapter = trained(folder, mapped).adapter({})
    two = tmp_path / "two"
    two.mkdir()
    for i in range(2):
        (two / f"{i}.png").write_bytes((mapped / "conditions" / f"{i}.png").read_bytes())
    config = PreviewConfig(steps=2, batch_size=3, condition=str(two))
    files = preview(base, adapter, ["a cat", "a toy"], [0, 1], tmp_path / "both", config)
    assert [file.name for file in files[:3]] == ["grid.png", "condition-0.png", "condition-1.png"]
    alone = preview(
        base, adapter, ["a toy"], [1], tmp_path / "one", PreviewConfig(steps=2, condition=str(two / "1.png"))
    )
    pictures = [np.asarray(Image.open(p)).astype(int) for p in (tmp_path / "both" / "with-1-seed1.png", alone[-1])]
    assert alone[-1].name == "with-0-seed1.png" and np.abs(pictures[0] - pictures[1]).max() <= 1
    wide = PreviewConfig(steps=1, condition=str(two / "1.png"), width=2 * base.side())
    shown = preview(base, adapter, ["a toy"], [1], tmp_path / "wide", wide)
    assert {Image.open(path).size for path in shown[1:]} == {(2 * base.side(), base.side())} and len(shown) == 4
    with pytest.raises(InputError, match="2 pictures for 3 prompts"):
        preview(base, adapter, ["a", "b", "c"], [0], tmp_path / "three", config)
    with pytest.raises(InputError, match="1 ControlNets or T2I-Adapters are attached, so as many are needed"):
        preview(base, adapter, ["a cat"], [0], tmp_path / "none", PreviewConfig(steps=1))
    with pytest.raises(InputError, match="nothing.png"):
        preview(base, adapter, ["a"], [0], tmp_path / "n", PreviewConfig(condition=str(tmp_path / "nothing.png")))


@pytest.mark.slow
def test_several_controlnets_add_up_as_in_diffusers(folder: Path, mapped: Path, base: DiffusionBase, tmp_path: Path):
    first = trained(folder, mapped).adapter({})
    second = trained(folder, mapped, {"name": "controlnet", "condition": "soft_edge"}).adapter({})
    second.save(tmp_path / "second")
    maps = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)) for i in range(2)]
    paths = tuple(str(tmp_path / f"{i}.png") for i in range(2))
    for each, path in zip(maps, paths, strict=True):
        each.save(path)
    config = PreviewConfig(
        steps=3, condition=paths, ready=True, beside=str(tmp_path / "second"), weights=(0.5, 0.8)
    )  # fmt: skip
    files = preview(base, first, ["a red cat"], [5], tmp_path / "out", config)
    assert {"condition 1-0-seed5.png", "condition 2-0-seed5.png"} <= {file.name for file in files}
    networks = []
    for i, adapter in enumerate((first, second)):
        adapter.export(tmp_path / f"net{i}", "diffusers")
        networks.append(ControlNetModel.from_pretrained(tmp_path / f"net{i}"))
    pipe = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=networks, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        "a red cat", maps, height=8, width=8, num_inference_steps=3, guidance_scale=3.0,
        controlnet_conditioning_scale=[0.5, 0.8], generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    ours = np.asarray(Image.open(files[-1])).astype(int)
    assert np.abs(ours - np.asarray(stock)).max() <= 1


def test_through_the_loop_with_samples_and_exact_resume(folder: Path, mapped: Path, tmp_path: Path):
    method = {"name": "controlnet", "condition": "canny"}
    sampled = job(folder, mapped, method, learning_rate=1e-3) | {"sample": {"every": 2, "steps": 1, "seeds": [0]}}
    whole = graft.train(sampled, run_dir=tmp_path / "whole")
    sheet = Image.open(whole.folder / "samples" / "step-000004.png")
    assert sheet.size[0] == 4 * 8 + 3 * 128  # the condition, and one seed without and with
    short = job(folder, mapped, method, learning_rate=1e-3, checkpoint_every=2)
    cut = graft.train(short, run_dir=tmp_path / "cut")
    for folder_of in ("checkpoints",):
        newest = sorted((cut.folder / folder_of).iterdir())[-1]
        for file in sorted(newest.rglob("*"), reverse=True) if newest.is_dir() else []:
            file.unlink()
        newest.rmdir() if newest.is_dir() else newest.unlink()
    cut.write_state(status="stopped")
    again = resume(cut)
    expected = whole.adapter().tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.adapter().tensors.items())
    assert again.job.train.weight_decay == 0.01
    assert len(whole.metrics()) >= 1 and whole.adapter().card.details["controlnet"]["in_channels"] == 4


def test_the_frozen_encoder_keeps_nothing_for_a_backward_pass(folder: Path, mapped: Path):
    task = prepare(Job.load(job(folder, mapped)))
    seen: dict[str, Any] = {}
    for name in ("down_blocks.1", "mid_block", "up_blocks.0"):
        part = task.base.denoiser.get_submodule(name)
        part.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out))
    task(task.batch(0, torch.Generator().manual_seed(0)))
    needs = {name: (out[0] if isinstance(out, tuple) else out).requires_grad for name, out in seen.items()}
    assert needs == {"down_blocks.1": False, "mid_block": False, "up_blocks.0": True}


@pytest.mark.slow
def test_bf16_trains_close_to_fp32(folder: Path, mapped: Path):
    wide, narrow = (prepare(Job.load(job(folder, mapped, mixed_precision=p))) for p in ("no", "bf16"))
    batch = wide.batch(0, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = narrow(batch)
    loss.backward()
    assert loss.item() == pytest.approx(wide(batch)[0].item(), rel=0.02)
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}


@pytest.mark.slow
def test_the_command_line_takes_conditions(folder: Path, mapped: Path, tmp_path: Path):
    trained(folder, mapped).adapter({}).save(tmp_path / "edges")
    options = [
        "--device",
        "cpu",
        "--seed",
        "0",
        "--prompt",
        "a cat",
        "--set",
        "steps=1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["preview", str(tmp_path / "edges"), *options, "--set", f"condition={mapped / '0.png'}"]) == 0
    assert (tmp_path / "out" / "condition-0-seed0.png").exists()
    assert main(["preview", str(tmp_path / "edges"), *options]) == 2
    measured = ["--data", str(mapped), "--set", "seeds=1", "--set", "steps=1"]
    assert main(["eval", str(tmp_path / "edges"), *measured]) == 2  # depth needs a model that reads it
    canny = {"name": "controlnet", "condition": "canny"}
    prepare(Job.load(job(folder, mapped, canny))).adapter({}).save(tmp_path / "canny")
    assert main(["eval", str(tmp_path / "canny"), *measured]) == 0


def test_promises_of_control_are_checked():
    row = {"precision": 0.5, "recall": 0.5, "exact": 0.2}
    judged: dict[str, dict[str, float]] = {
        "base": {**row, "f1": 0.3, "clip": 0.8},
        "control": {**row, "f1": 0.75, "clip": 0.75},
    }
    found = checks(judged)
    assert [check["ok"] for check in found.values()] == [True, False, False]
    assert table({"steps": 1, "minutes": 1.0, "measures": judged, "checks": found}).count("MISSED") == 2


@pytest.mark.slow
def test_both_loops_of_the_benchmark_have_the_same_losses(folder: Path, tmp_path: Path):
    found = compared(tmp_path, str(folder), batch_size=4, rounds=2)
    assert found["equal"] and found["ratio"] > 0
    assert found["parts"]["plain"].keys() - found["parts"]["ours"].keys() == {"VAE", "text encoder"}
