"""Pipelines with a transformer: random ones of the true classes, as a folder, through LoRA and back into diffusers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from graft.diffusion.base import load_base
from graft.diffusion.jobs import prepare
from graft.diffusion.objectives import Flow
from graft.diffusion.transformers import FluxBase, SD3Base, ZImageBase, packed, unpacked
from graft.studio.adapter import load_adapter
from graft.studio.errors import InputError
from graft.studio.job import Job

SIDE = 16


def vae(channels: int) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=channels, norm_num_groups=4, sample_size=SIDE,
        scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False, **blocks,
    )  # fmt: skip


def clip(words: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id, projection_dim=16,
    )  # fmt: skip


def t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    words = ("a", "photo", "of", "the", "red", "cat", "toy")
    pieces = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in words), "\u2581"]
    tokenizer = T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate([*pieces, *"abcdefghijklmnopqrstuvwxyz"])]
    )
    tokenizer.model_max_length = 20
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config), tokenizer


def sd3(words: CLIPTokenizer) -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    long, pieces = t5()
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(4),
        text_encoder=CLIPTextModelWithProjection(clip(words)), tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(clip(words)), tokenizer_2=words,
        text_encoder_3=long, tokenizer_3=pieces,
    )  # fmt: skip


def flux(words: CLIPTokenizer) -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    long, pieces = t5()
    return FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae(4),
        text_encoder=CLIPTextModel(clip(words)), tokenizer=words, text_encoder_2=long, tokenizer_2=pieces,
    )  # fmt: skip


def z_image(words: CLIPTokenizer) -> DiffusionPipeline:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789\u0120<>|_"
    chat = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    chat.add_special_tokens({"pad_token": "<|endoftext|>"})
    chat.chat_template = "{% for message in messages %}user {{ message['content'] }}{% endfor %}"
    config = Qwen3Config(
        vocab_size=len(chat) + 8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 4, 8], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    return ZImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(4),
        text_encoder=Qwen3Model(config), tokenizer=chat,
    )  # fmt: skip


BUILT: dict[str, Callable[[CLIPTokenizer], DiffusionPipeline]] = {"sd3": sd3, "flux": flux, "z-image": z_image}


@pytest.fixture(scope="module", params=list(BUILT))
def family(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    pipe = BUILT[request.param](CLIPTokenizer.from_pretrained(folder / "tokenizer"))
    for parameter in pipe.transformer.parameters():  # some start at zero, and would hide what is told
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.save_pretrained(path)
    return request.param, path


def job(path: Path, photos: Path, **method: Any) -> Job:
    data = {"path": str(photos), "resolution": SIDE}
    train = {"batch_size": 2, "device": "cpu", "mixed_precision": "no"}
    return Job.load({"base": str(path), "method": {"name": "lora", "rank": 2, **method}, "data": data, "train": train})


def told(name: str, pipe: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    """What the pipeline itself makes of prompts."""
    if name == "sd3":
        text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}
    if name == "flux":
        text, pooled, _ = pipe.encode_prompt(prompts, max_sequence_length=20)
        return {"text": text, "pooled": pooled}
    texts, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return {"text": torch.cat(texts)}


def test_prompts_are_encoded_as_the_pipeline_does(family: tuple[str, Path]):
    name, path = family
    base = load_base(str(path), "cpu")
    assert type(base) is {"sd3": SD3Base, "flux": FluxBase, "z-image": ZImageBase}[name]
    prompts = ["a photo of the red cat", "a toy"]
    found, expected = base.condition(base.tokenize(prompts)), told(name, base.pipe, prompts)
    if name == "z-image":
        found = {"text": found["text"][found["there"].bool()]}
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)
    base.exercise()


def test_the_pipeline_draws_what_euler_steps_of_our_velocity_give(family: tuple[str, Path]):
    """One prompt, two steps without guidance: x <- x + (s' - s) v(x, 1000 s)."""
    name, path = family
    base = load_base(str(path), "cpu")
    pipe, prompt = base.pipe, "a red cat"
    latents = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(3))
    off = {"sd3": {"guidance_scale": 1.0}, "flux": {"guidance_scale": 1.0, "max_sequence_length": 20}}
    given = packed(latents) if name == "flux" else latents.clone()
    drawn = pipe(
        prompt, height=SIDE, width=SIDE, num_inference_steps=2, latents=given, output_type="latent",
        **off.get(name, {"guidance_scale": 0.0}),
    ).images  # fmt: skip
    x, condition = latents, base.condition(base.tokenize([prompt]))
    for now, then in zip(pipe.scheduler.sigmas[:-1], pipe.scheduler.sigmas[1:], strict=True):
        x = x + (then - now) * base.denoise(x, now.view(1) * 1000, condition)
    torch.testing.assert_close(base.as_drawn(drawn, SIDE, SIDE), x, rtol=1e-4, atol=1e-4)


def test_a_lora_trains_and_stock_diffusers_draws_the_same(family: tuple[str, Path], photos: Path, tmp_path: Path):
    name, path = family
    task = prepare(job(path, photos, class_prompt="a toy" if name == "flux" else None, class_pictures=2))
    shift = {"flux": np.exp(0.5 + 0.65 * (16 - 256) / (4096 - 256)), "sd3": 3.0, "z-image": 3.0}[name]
    assert isinstance(task.objective, Flow) and task.objective.shift == pytest.approx(shift)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        task(task.batch(step, torch.Generator().manual_seed(step)))[0].backward()
        optimizer.step()
    task.adapter({}).export(tmp_path, "diffusers")
    stock = DiffusionPipeline.from_pretrained(path)
    plain = picture(stock, name)
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert np.abs(plain - picture(task.base.pipe, name)).max() > 1e-4
    np.testing.assert_allclose(picture(stock, name), picture(task.base.pipe, name), atol=1e-5)
    fresh = load_base(str(path), "cpu")
    with load_adapter(tmp_path).attached(fresh):
        np.testing.assert_allclose(picture(fresh.pipe, name), picture(stock, name), atol=1e-5)


@pytest.mark.slow
def test_pictures_of_several_shapes_are_trained_on(family: tuple[str, Path], photos: Path):
    name, path = family
    for i in range(2):
        Image.open(photos / f"{i}.png").rotate(90, expand=True).save(photos / f"{i}.png")
    given = job(path, photos, class_prompt="a toy" if name == "flux" else None, class_pictures=2)
    task = prepare(replace(given, data={**given.data, "buckets": True}))
    shift = {"flux": np.exp(0.5 + 0.65 * (15 - 256) / (4096 - 256)), "sd3": 3.0, "z-image": 3.0}[name]
    found = [source.objective for source in task.sources]
    assert [each.shift for each in found if isinstance(each, Flow)] == pytest.approx([shift] * len(found))
    shapes = set()
    for step in range(5):
        batch = task.batch(step, torch.Generator().manual_seed(step))
        shapes.add(tuple(batch.mean.shape[-2:]))
        loss, _ = task(batch)
        loss.backward()
        assert bool(loss.isfinite())
    assert shapes == {(6, 10), (10, 6)}


def test_sixteen_bits_are_near(family: tuple[str, Path], photos: Path):
    _, path = family
    wide, narrow = (prepare(replace(j, train=replace(j.train, mixed_precision=p))) for j in [job(path, photos)]
                    for p in ("no", "bf16"))  # fmt: skip
    batch = wide.batch(0, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = narrow(batch)
    loss.backward()
    assert loss.item() == pytest.approx(wide(batch)[0].item(), rel=0.05)


def picture(pipe: Any, name: str) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    short = {"max_sequence_length": 20} if name == "flux" else {}
    generator = torch.Generator().manual_seed(11)
    return pipe("a photo of a toy", generator=generator, num_inference_steps=2, height=SIDE, width=SIDE,
                output_type="np", **short).images[0]  # fmt: skip


def test_words_are_learnt_elsewhere(family: tuple[str, Path], photos: Path):
    _, path = family
    for name in ("textual_inversion", "custom_diffusion"):
        with pytest.raises(InputError, match="Use method lora"):
            prepare(replace(job(path, photos), method={"name": name}))
    with pytest.raises(InputError, match="needs a multiple of 4"):
        load_base(str(path), "cpu").side(18)


def test_packing_is_the_pipelines():
    latents = torch.randn(2, 4, 6, 8)
    theirs = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(packed(latents), theirs) and torch.equal(unpacked(theirs, 6, 8), latents)


def test_sdpa_may_be_asked_for(family: tuple[str, Path]):
    assert load_base(str(family[1]), "cpu", attention="sdpa").attention == "sdpa"
