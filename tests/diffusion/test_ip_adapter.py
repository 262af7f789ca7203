"""IP-Adapter against its formula, and against diffusers, which loads and draws from the same files."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from graft.diffusion import aligned_start, ip_adapter
from graft.diffusion.base import DiffusionBase, load_base
from graft.diffusion.decoupled_attention import Shown, cross_attentions
from graft.diffusion.evaluation import EvaluationConfig, evaluate
from graft.diffusion.image_encoder import ImageEncoder
from graft.diffusion.ip_adapter import Bank, IPAdapter
from graft.diffusion.jobs import prepare, prepare_together
from graft.diffusion.previews import PreviewConfig, draw, preview
from graft.diffusion.resampler import Resampler
from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.errors import BaseMismatchError, FormatError, InputError, SiteError
from graft.studio.job import Job, SampleConfig
from graft.studio.training import resume, train

KINDS = ("base", "plus")
BASE_FIRST = pytest.mark.parametrize("method", ["base", pytest.param("plus", marks=pytest.mark.slow)], indirect=True)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random image tower as a folder of transformers."""
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=10,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("encoder")
    CLIPVisionModelWithProjection(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ip_adapter, "FEWEST", 1)


@pytest.fixture(params=KINDS)
def method(request: pytest.FixtureRequest, encoder: Path) -> Any:
    return IPAdapter(kind=request.param, image_encoder=str(encoder), queries=5)


@pytest.fixture
def pictures(photos: Path) -> list[Image.Image]:
    return [Image.open(path) for path in sorted(photos.iterdir())]


def job(base: str | Path, photos: Path, method: Any, **train) -> Job:
    section = {
        "name": "ip_adapter", "kind": method.kind, "image_encoder": method.image_encoder, "queries": method.queries,
    }  # fmt: skip
    section |= {"init": method.init} if method.init else {}
    train = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "mixed_precision": "no", "device": "cpu", **train}
    return Job.load(
        {"base": str(base), "domain": "diffusion", "method": section, "data": {"path": str(photos)}, "train": train}
    )


def states(base: DiffusionBase) -> dict[str, Tensor]:
    return {f"{n}.{k}": v.clone() for n, m in base.modules.items() for k, v in m.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trained(task, steps: int = 2):
    optimizer = torch.optim.AdamW(task.param_groups(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        task(task.batch(step, torch.Generator().manual_seed(step)))[0].backward()
        optimizer.step()
    return task


def picture(pipe, prompt: str | list[str] = "a photo of a toy", guidance: float = 3.0, **more) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    settings = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "np", "guidance_scale": guidance}
    generators = [torch.Generator().manual_seed(11 + i) for i in range(len(prompts))]
    return pipe(prompts, generator=generators, **settings, **more).images


@BASE_FIRST
def test_the_attention_is_the_papers_and_that_of_diffusers(base: DiffusionBase, method: Any):
    handle = method.attach(base)
    name, attention = next(iter(cross_attentions(base.pipe.unet).items()))
    x, text, tokens = torch.randn(2, 9, attention.query_dim), torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    scale = torch.tensor([[0.7], [0.0]])
    own = handle.bank.ip_adapter["1"]
    torch.nn.init.normal_(own.to_v_ip.weight)
    handle.now = Shown(tokens, scale)
    found = attention.processor(attention, x, text)

    def attend(source, to_k, to_v):
        q, k, v = (layer(y).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
                   for layer, y in ((attention.to_q, x), (to_k, source), (to_v, source)))  # fmt: skip
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    pictured = attend(tokens, own.to_k_ip, own.to_v_ip)
    plain = attend(text, attention.to_k, attention.to_v)
    torch.testing.assert_close(found, attention.to_out[0](plain + scale[:, None] * pictured), rtol=1e-5, atol=1e-6)
    theirs = IPAdapterAttnProcessor2_0(attention.query_dim, 16, (5,), 0.7)
    theirs.to_k_ip[0], theirs.to_v_ip[0] = own.to_k_ip, own.to_v_ip
    expected = theirs(attention, x, (text, [tokens[:, None]]))
    torch.testing.assert_close(found[:1], expected[:1], rtol=1e-5, atol=1e-6)
    mask = torch.where(torch.arange(7) < 4, 0.0, -1e4).expand(2, 1, 7)
    masked = attention.processor(attention, x, text, mask)
    handle.now = Shown(tokens, scale)
    torch.testing.assert_close(masked, attention.processor(attention, x, text[:, :4]), rtol=1e-5, atol=1e-6)
    handle.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_counts_are_the_references(kind: Any):
    """Of Stable Diffusion 1.5, on the meta device; the numbers of the published adapters."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        bank = Bank(unet, IPAdapter(kind=kind), 1280 if kind == "plus" else 1024)
    keys = [key for key in bank.state_dict() if key.startswith("ip_adapter.")]
    assert keys == [f"ip_adapter.{i}.to_{x}_ip.weight" for i in range(1, 32, 2) for x in "kv"]
    assert sum(p.numel() for p in bank.ip_adapter.parameters()) == 19_169_280
    others = {key: tuple(tensor.shape) for key, tensor in bank.image_proj.state_dict().items()}
    if kind == "base":
        assert others == {
            "proj.weight": (3072, 1024), "proj.bias": (3072,), "norm.weight": (768,), "norm.bias": (768,),
        }  # fmt: skip
        assert sum(p.numel() for p in bank.image_proj.parameters()) == 3_150_336
        return
    layer = {"0.norm1.weight", "0.norm1.bias", "0.norm2.weight", "0.norm2.bias", "0.to_q.weight", "0.to_kv.weight",
             "0.to_out.weight", "1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight"}  # fmt: skip
    outer = {"latents", *(f"{n}.{x}" for n in ("proj_in", "proj_out", "norm_out") for x in ("weight", "bias"))}
    assert set(others) == outer | {f"layers.{i}.{name}" for i in range(4) for name in layer}
    assert others["latents"] == (1, 16, 768) and others["layers.3.0.to_kv.weight"] == (1536, 768)
    # to_q and to_out d x 12 x 64, to_kv twice that, a feed-forward part of 2 d x 4 d, three norms; d = 768
    inside = 4 * (12 * 768 * 768 + 6 * 768)
    assert sum(p.numel() for p in bank.image_proj.parameters()) == inside + 16 * 768 + 1281 * 768 + 769 * 768 + 1536


def test_the_resampler_is_that_of_diffusers():
    torch.manual_seed(0)
    ours = Resampler(24, 16, 5, 128).eval()
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=16, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    theirs = unet._convert_ip_adapter_image_proj_to_diffusers(ours.state_dict())
    seen = torch.randn(3, 7, 24)
    torch.testing.assert_close(ours(seen), theirs(seen), rtol=1e-5, atol=1e-5)


@BASE_FIRST
def test_the_loss_is_the_reference_recipe(folder: Path, photos: Path, method: Any):
    """With the tokens of picture and text side by side in diffusers' own processors, at a trained step."""
    task: Any = trained(prepare(job(folder, photos, method)))
    batch, pipe = task.batch(3, torch.Generator().manual_seed(2)), task.base.pipe
    loss = task(batch)[0]
    seen, absent = batch.extras["picture"], ImageEncoder(method.image_encoder).absent(method.patches)
    seen = torch.where(batch.extras["shown"].view(-1, *[1] * (seen.dim() - 1)) > 0, seen, absent)
    tokens = task.bank.image_proj(seen)
    task.handle.detach()
    layers, names = iter(task.bank.ip_adapter.values()), pipe.unet.attn_processors
    theirs = {}
    for name, former in names.items():
        theirs[name] = former
        if name.endswith("attn2.processor"):
            own, size = next(layers), pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim
            theirs[name] = IPAdapterAttnProcessor2_0(size, 16, (tokens.shape[1],))
            theirs[name].to_k_ip[0], theirs[name].to_v_ip[0] = own.to_k_ip, own.to_v_ip
    pipe.unet.set_attn_processor(theirs)
    text = task.base.encode(task.base.tokenize([""])).expand(len(tokens), -1, -1)  # pictures without captions
    noisy = pipe.scheduler.add_noise(batch.mean + batch.std * batch.redraw, batch.noise, batch.levels)
    prediction = pipe.unet(noisy, batch.levels, torch.cat([text, tokens], dim=1)).sample
    expected = F.mse_loss(prediction, batch.noise)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@BASE_FIRST
def test_rows_go_without_picture_text_or_both(folder: Path, photos: Path, method: Any):
    for i in range(5):
        (photos / f"{i}.txt").write_text("a photo of a cat")
    task: Any = prepare(job(folder, photos, method))
    task.sources = [replace(task.sources[0], rows=4000)]
    batch = task.batch(0, torch.Generator().manual_seed(0))
    shown = batch.extras["shown"] > 0
    told = batch.prompts[batch.prompt_of] != task.sources[0].drops.empty
    for share, rows in ((0.05, ~shown & told), (0.05, shown & ~told), (0.05, ~shown & ~told), (0.85, shown & told)):
        assert rows.float().mean() == pytest.approx(share, abs=0.015)
    one = task.batch(0, torch.Generator().manual_seed(0))
    assert torch.equal(one.extras["picture"], batch.extras["picture"])
    absent = ImageEncoder(method.image_encoder).absent(method.patches)
    assert bool(absent.any()) == method.patches  # the encoding of nothing, or nothing


@BASE_FIRST
def test_starts_from_copies_and_gradients_reach_all(folder: Path, photos: Path, method: Any):
    task: Any = prepare(job(folder, photos, method))
    attentions = cross_attentions(task.base.pipe.unet).values()
    for own, attention in zip(task.bank.ip_adapter.values(), attentions, strict=True):
        assert torch.equal(own.to_k_ip.weight, attention.to_k.weight)
        assert torch.equal(own.to_v_ip.weight, attention.to_v.weight)
    before = states(task.base)
    task(task.batch(0, torch.Generator().manual_seed(0)))[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in task.parameters())
    assert [g["weight_decay"] for g in task.param_groups()] == [0.01]
    assert all(p.grad is not None for p in task.parameters())
    assert same(before, states(task.base))
    other = method.attach(load_base(str(folder), "cpu"), seed=1).bank
    assert not same(task.bank.image_proj.state_dict(), other.image_proj.state_dict())


@pytest.mark.slow
def test_resume_is_exact(folder: Path, photos: Path, tmp_path: Path, method: Any):
    settings = {"checkpoint_every": 2, "checkpoint_seconds": 0.0, "threads": 1}
    whole = train(job(folder, photos, method, **settings, steps=4), run_dir=tmp_path / "whole")
    cut = train(job(folder, photos, method, **settings, steps=2), run_dir=tmp_path / "cut")
    text = (cut.folder / "job.toml").read_text()
    (cut.folder / "job.toml").write_text(text.replace("steps = 2\n", "steps = 4\n", 1))
    cut.write_state(status="stopped")
    again = resume(cut.folder)
    assert again.state["step"] == 4
    assert same(whole.adapter().tensors, again.adapter().tensors)


@BASE_FIRST
def test_at_scale_0_and_after_detaching_the_base_is_as_it_was(
    base: DiffusionBase, method: Any, pictures: list[Image.Image]
):
    before, processors, plain = states(base), dict(base.pipe.unet.attn_processors), picture(base.pipe)
    handle = method.attach(base)
    assert same(before, states(base))
    assert np.array_equal(plain, picture(base.pipe))  # nothing is shown yet
    handle.show([pictures[:1]])
    shown = picture(base.pipe)
    assert np.abs(plain - shown).max() > 1e-3
    handle.scale(0, 0.0)
    assert np.array_equal(plain, picture(base.pipe))
    handle.scale(0, 1.0)
    handle.show([pictures[:1]], scale=0.0)
    assert np.array_equal(plain, picture(base.pipe))
    handle.show([pictures[:1]] * 2, scale=[0.0, 1.0])  # beside a row that is shown one
    pair = picture(base.pipe, ["a photo of a toy"] * 2)
    np.testing.assert_allclose(pair[:1], plain, atol=1e-6)
    handle.detach()
    handle.detach()
    assert same(before, states(base)) and base.pipe.unet.attn_processors == processors
    assert np.array_equal(plain, picture(base.pipe))


@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 3.0])
@BASE_FIRST
def test_mixed_rows_equal_each_alone(base: DiffusionBase, method: Any, pictures: list[Image.Image], guidance: float):
    """Of one, two and three pictures, each with its own scale."""
    handle = method.attach(base)
    rows, scales = [pictures[:1], pictures[1:3], pictures[2:5]], [1.0, 0.4, 0.7]
    prompts = ["a photo of a cat", "a toy", "the red cat"]
    alone = []
    for i in range(3):
        handle.show([rows[i]], scales[i])
        alone.append(picture(base.pipe, prompts, guidance)[i])
    handle.show(rows, scales)
    np.testing.assert_allclose(picture(base.pipe, prompts, guidance), np.stack(alone), atol=1e-5)
    with pytest.raises(InputError, match="the pipeline draws 2 at once"):
        picture(base.pipe, prompts[:2], guidance)
    handle.detach()


def stock(cls, folder: Path, written: Path):
    pipe = cls.from_pretrained(folder, **({"add_watermarker": False} if cls is StableDiffusionXLPipeline else {}))
    pipe.load_ip_adapter(str(written), subfolder="", weight_name="ip_adapter.safetensors")
    return pipe


@BASE_FIRST
@pytest.mark.parametrize("xl_base", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sd", "sdxl"])
def test_diffusers_draws_the_same_from_our_file_and_we_from_theirs(
    folder: Path,
    xl: Path,
    photos: Path,
    tmp_path: Path,
    method: Any,
    pictures: list,
    xl_base: bool,
):
    where, cls = (xl, StableDiffusionXLPipeline) if xl_base else (folder, StableDiffusionPipeline)
    task: Any = trained(prepare(job(where, photos, method)))
    files = task.adapter({}).export(tmp_path / "out", "diffusers")
    assert [file.name for file in files] == ["ip_adapter.safetensors", "image_encoder"]
    pipe, handle = stock(cls, where, tmp_path / "out"), task.handle
    pipe.set_ip_adapter_scale(0.6)
    plain = picture(task.base.pipe)
    handle.show([pictures[:1]], 0.6)
    ours = picture(task.base.pipe)
    assert np.abs(ours - plain).max() > 1e-3
    np.testing.assert_allclose(picture(pipe, ip_adapter_image=pictures[0]), ours, atol=2e-5)
    handle.show([pictures[:2]], 0.6)
    theirs = picture(pipe, ip_adapter_image=[pictures[:2]])
    np.testing.assert_allclose(theirs, picture(task.base.pipe), atol=2e-5)
    fresh = load_base(str(where), "cpu")
    with load_adapter(tmp_path / "out").attached(fresh) as handle:
        handle.show([pictures[:2]], 0.6)
        np.testing.assert_allclose(theirs, picture(fresh.pipe), atol=2e-5)


@pytest.mark.slow
def test_an_encoder_with_a_processor_of_its_own_goes_beside_the_file(
    base: DiffusionBase, folder: Path, encoder: Path, tmp_path: Path, pictures: list
):
    tower = CLIPVisionModelWithProjection.from_pretrained(encoder)
    tower.save_pretrained(tmp_path / "own")
    processor = CLIPImageProcessor(size=16, crop_size=16, image_mean=[0.1] * 3, image_std=[0.9] * 3)
    processor.save_pretrained(tmp_path / "own")
    method = IPAdapter(image_encoder=str(tmp_path / "own"))
    handle = method.attach(base)
    config = {"kind": "base", "image_encoder": method.image_encoder}
    Adapter(handle.tensors(), Card("ip_adapter", config, "diffusion")).export(tmp_path / "out", "diffusers")
    pipe = stock(StableDiffusionPipeline, folder, tmp_path / "out")
    pipe.feature_extractor = CLIPImageProcessor.from_pretrained(tmp_path / "out" / "image_encoder")
    handle.show([pictures[:1]])
    np.testing.assert_allclose(picture(pipe, ip_adapter_image=pictures[0]), picture(base.pipe), atol=2e-5)


@pytest.mark.slow
def test_a_file_of_another_program_is_read_and_gone_on_from(
    folder: Path, photos: Path, tmp_path: Path, encoder: Path, pictures: list
):
    """Written in half precision, named as they name it, in the order that they give it."""
    torch.manual_seed(5)
    unet = load_base(str(folder), "cpu").pipe.unet
    tensors = {"image_proj.proj.weight": torch.randn(64, 10), "image_proj.proj.bias": torch.randn(64),
               "image_proj.norm.weight": torch.randn(16), "image_proj.norm.bias": torch.randn(16)}  # fmt: skip
    for i, attention in enumerate(cross_attentions(unet).values()):
        for x in "kv":
            tensors[f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight"] = torch.randn(attention.inner_dim, 16)
    out = tmp_path / "theirs"
    CLIPVisionModelWithProjection.from_pretrained(encoder).save_pretrained(out / "image_encoder")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, out / "ip_adapter.safetensors")
    adapter, base = load_adapter(out / "ip_adapter.safetensors"), load_base(str(folder), "cpu")
    assert adapter.card.method == "ip_adapter" and adapter.card.config["kind"] == "base"
    with adapter.attached(base) as handle:
        handle.show([pictures[:1]])
        ours = picture(base.pipe)
    theirs = picture(stock(StableDiffusionPipeline, folder, out), ip_adapter_image=pictures[0])
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    goes_on = prepare(job(folder, photos, IPAdapter(image_encoder=str(encoder), init=str(out))))
    assert same(goes_on.bank.state_dict(), {name: tensor.half().float() for name, tensor in tensors.items()})
    with pytest.raises(InputError, match="its kind is base"):
        prepare(job(folder, photos, IPAdapter(kind="plus", image_encoder=str(encoder), init=str(out))))
    (out / "image_encoder").rename(tmp_path / "gone")
    with load_adapter(out).attached(base) as handle, pytest.raises(InputError, match="which image encoder"):
        handle.show([pictures[:1]])
    save_file({**tensors, "ip_adapter.1.to_k_lora.down.weight": torch.zeros(2)}, out / "ip_adapter.safetensors")
    with pytest.raises(FormatError, match="of another kind"):
        load_adapter(out)


@pytest.mark.slow
def test_adapters_previews_and_samples(
    folder: Path, base: DiffusionBase, photos: Path, tmp_path: Path, method: Any, pictures: list
):
    task: Any = trained(prepare(job(folder, photos, method)))
    quiet = task.batch(0, torch.Generator().manual_seed(0))
    loss = task(quiet)[0]
    [file] = task.sample(2, tmp_path / "samples")
    assert Image.open(file).width == 2 * (2 * 128 + 8) + 8 and task(quiet)[0] == loss
    config = PreviewConfig(steps=2, image=str(photos / "0.png"), scale=0.5)
    task.handle.show([pictures[:1]], 0.5)
    expected = draw(task.base, ["a toy"], [3], config)[0][0]
    task.adapter({}).save(tmp_path / "result")
    adapter = load_adapter(tmp_path / "result")
    files = preview(base, adapter, ["a toy"], [3], tmp_path / "out", config)
    assert {f.name for f in files} >= {"grid.png", "shown-0-seed3.png", "with-0-seed3.png", "without-0-seed3.png"}
    assert Image.open(tmp_path / "out" / "with-0-seed3.png").tobytes() == expected.tobytes()
    for image, message in (("", "this adapter follows a picture"), (str(photos), "Give the file of a picture")):
        with pytest.raises(InputError, match=message):
            preview(base, adapter, ["a toy"], [3], tmp_path / "out", PreviewConfig(steps=2, image=image))
    figures = evaluate(base, adapter, EvaluationConfig(path=str(photos), seeds=1, steps=2))
    assert figures != evaluate(base, None, EvaluationConfig(path=str(photos), seeds=1, steps=2))
    assert adapter.card.details["image_encoder"] == method.image_encoder
    wrong = load_adapter(tmp_path / "result")
    wrong.card.details["image_encoder_hash"] = "another"
    with wrong.attached(base) as handle, pytest.raises(BaseMismatchError, match="image encoder"):
        handle.show([pictures[:1]])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["base"], indirect=True)
def test_samples_are_drawn_at_every_strength(folder: Path, photos: Path, tmp_path: Path, method: Any):
    sample = SampleConfig(every=1, steps=1, prompts=("a toy",), seeds=(3,), strengths=(0.0, 1.0))
    task: Any = trained(prepare(replace(job(folder, photos, method), sample=sample)))
    with torch.no_grad():
        for parameter in task.bank.parameters():
            parameter.mul_(5)
    [file] = task.sample(2, tmp_path)
    whole = np.asarray(Image.open(file)).astype(int)
    side = 128 + 8
    shown, without, off, on = (whole[36:164, 8 + i * side : i * side + side] for i in range(4))
    assert np.array_equal(without, off) and not np.array_equal(on, off) and not np.array_equal(shown, on)


@pytest.mark.slow
@pytest.mark.parametrize("xl_base", [False, True], ids=["sd", "sdxl"])
def test_an_aligned_start_says_of_pictures_what_the_text_encoder_says_of_texts(
    folder: Path, xl: Path, encoder: Path, pictures: list, xl_base: bool, monkeypatch: pytest.MonkeyPatch
):
    """With fewer pictures than features and no ridge the map is exact; the layer norm has the states' own spread."""
    monkeypatch.setattr(aligned_start, "RIDGE", 1e-9)
    base, texts = load_base(str(xl if xl_base else folder), "cpu"), ["a toy", "a red cat", "cat", "a toy", "blue"]
    method = IPAdapter(image_encoder=str(encoder))
    adapter = aligned_start.aligned_start(base, pictures[:3] + pictures[:1] + pictures[4:], texts, method)
    told = base.condition(base.tokenize(["a toy", "a red cat", "cat", "blue"]))["text"]
    ends = [len(base.tokenizer(text).input_ids) - 1 for text in ("a toy", "a red cat", "cat", "blue")]
    states = torch.stack([told[i, [end, end - 1, end - 2, end + 1]] for i, end in enumerate(ends)])
    means, spread = states.mean((0, 1)), states.std((0, 1))
    if not xl_base:
        means, spread = (getattr(base.pipe.text_encoder.final_layer_norm, name) for name in ("bias", "weight"))
    with adapter.attached(base) as handle:
        seen = ImageEncoder(str(encoder)).features([*pictures[:3], pictures[4]], False)
        found = handle.bank.image_proj.proj(seen).unflatten(-1, (4, -1))
    torch.testing.assert_close(found, (states - means) / spread, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(adapter.tensors["image_proj.norm.weight"], spread, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="for the base kind"):
        aligned_start.aligned_start(base, pictures, texts, replace(method, kind="plus"))


@pytest.mark.slow
def test_bf16_trains_close_to_fp32(folder: Path, photos: Path, method: Any):
    wide, narrow = (prepare(job(folder, photos, method, mixed_precision=p)) for p in ("no", "bf16"))
    batch = wide.batch(0, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = narrow(batch)
    loss.backward()
    assert loss.item() == pytest.approx(wide(batch)[0].item(), rel=0.02)
    assert all(p.dtype == torch.float32 and p.grad is not None for p in narrow.parameters())
    half = load_base(str(folder), "cpu", torch.bfloat16)
    handle = method.attach(half)
    handle.show([[Image.new("RGB", (16, 16), "red")]])
    assert np.isfinite(picture(half.pipe)).all()


@BASE_FIRST
def test_what_cannot_work_is_refused_with_the_remedy(
    folder: Path, base: DiffusionBase, photos: Path, method: Any, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(InputError, match="train one at a time|trains one at a time"):
        prepare_together([job(folder, photos, method)] * 2)
    monkeypatch.setattr(ip_adapter, "FEWEST", 200)
    with pytest.raises(InputError, match=r"5 pictures are learnt by heart.*textual_inversion"):
        prepare(job(folder, photos, method))
    with pytest.raises(InputError, match="does not tell which looks at the pictures"):
        IPAdapter().attach(base)
    with pytest.raises(InputError, match="no CLIP image tower"):
        IPAdapter(image_encoder=str(photos)).attach(base)
    handle = method.attach(base)
    with pytest.raises(SiteError, match="a Decoupled is there already"):
        method.attach(base)
    for rows, scale in (([[]], 1.0), ([[Image.new("RGB", (8, 8))]], [1.0, 0.5])):
        with pytest.raises(InputError, match="do not fit"):
            handle.show(rows, scale)
    handle.detach()
    with pytest.raises(InputError, match="its denoiser is no UNet"):
        method.attach(SimpleNamespace(name="flux", pipe=SimpleNamespace(unet=None), device=torch.device("cpu")))


@pytest.mark.slow
def test_pictures_of_several_shapes_are_trained_on(folder: Path, photos: Path, encoder: Path):
    for i in range(5):
        Image.new("RGB", ((48, 24), (24, 48))[i % 2], (40 * i, 0, 0)).save(photos / f"{i}.png")
    given = job(folder, photos, IPAdapter(image_encoder=str(encoder)))
    task = prepare(replace(given, data={"path": str(photos), "resolution": 32, "buckets": True}))
    looked = {}
    for source, dataset in zip(task.sources, task.subjects[0].datasets, strict=True):
        for mean, picture in zip(source.mean, dataset.pixels, strict=True):
            features = ImageEncoder(str(encoder)).features(
                [Image.fromarray(picture[0].permute(1, 2, 0).numpy())], False
            )
            looked[mean[0].numpy().tobytes()] = features[0]
    shapes = set()
    for step in range(5):
        batch = task.batch(step, torch.Generator().manual_seed(step))
        shapes.add(tuple(batch.mean.shape[-2:]))
        for mean, seen, shown in zip(batch.mean, batch.extras["picture"], batch.extras["shown"], strict=True):
            torch.testing.assert_close(seen, looked[mean.numpy().tobytes()] * shown)
        task(batch)[0].backward()
    assert shapes == {(12, 24), (24, 12)}
    shown = task.sample(5, photos.parent / "samples")
    assert Image.open(shown[0]).width > 0
