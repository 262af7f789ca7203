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
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from graft.diffusion.base import load_base
from graft.diffusion.jobs import prepare
from graft.diffusion.lora import DiffusionDoRA, DiffusionLoRA
from graft.diffusion.objectives import Flow
from graft.diffusion.transformers import (
    Flux2Base,
    Flux2KleinBase,
    FluxBase,
    QwenImageBase,
    SD3Base,
    ZImageBase,
    packed,
    unpacked,
)
from graft.diffusion.verification import compare
from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.config import to_dict
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


def chat_tokenizer() -> Qwen2Tokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789\u0120<>|_"
    chat = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    chat.add_special_tokens({"pad_token": "<|endoftext|>"})
    chat.chat_template = "{% for message in messages %}user {{ message['content'] }}{% endfor %}"
    return chat


def flux2_transformer(width: int, guided: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * width, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guided,
    )  # fmt: skip


def flux2_vae() -> AutoencoderKLFlux2:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    made = AutoencoderKLFlux2(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, **blocks)
    torch.nn.init.uniform_(made.bn.running_mean, -0.5, 0.5)
    torch.nn.init.uniform_(made.bn.running_var, 0.5, 2.0)
    return made


def flux2(words: CLIPTokenizer) -> DiffusionPipeline:
    chat = chat_tokenizer()
    chat.add_tokens(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    chat.chat_template = "{% for message in messages[1:] %}user {{ message['content'][0]['text'] }}{% endfor %}"
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "head_dim": 8}
    config = Mistral3Config(
        text_config=MistralConfig(vocab_size=64, num_hidden_layers=31, num_key_value_heads=1, **small),
        vision_config=PixtralVisionConfig(num_hidden_layers=1, image_size=28, patch_size=14, **small),
    )
    return Flux2Pipeline(
        transformer=flux2_transformer(8, guided=True),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=PixtralProcessor(PixtralImageProcessor(), chat, chat_template=chat.chat_template),
    )  # fmt: skip


def klein(words: CLIPTokenizer) -> DiffusionPipeline:
    chat = chat_tokenizer()
    config = Qwen3Config(
        vocab_size=len(chat) + 8, hidden_size=8, intermediate_size=8, num_hidden_layers=28, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return Flux2KleinPipeline(
        transformer=flux2_transformer(8, guided=False),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(config), tokenizer=chat,
    )  # fmt: skip


def qwen_image(words: CLIPTokenizer) -> DiffusionPipeline:
    chat = chat_tokenizer()
    text = {
        "vocab_size": len(chat) + 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16, "patch_size": 14,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    films = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.0, 2.0],
    )  # fmt: skip
    return QwenImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=films,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=chat,
    )  # fmt: skip


def z_image(words: CLIPTokenizer) -> DiffusionPipeline:
    chat = chat_tokenizer()
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


BUILT: dict[str, Callable[[CLIPTokenizer], DiffusionPipeline]] = {
    "sd3": sd3, "flux": flux, "z-image": z_image, "flux2": flux2, "klein": klein, "qwen-image": qwen_image,
}  # fmt: skip
CLASSES = {"sd3": SD3Base, "flux": FluxBase, "z-image": ZImageBase, "flux2": Flux2Base, "klein": Flux2KleinBase,
           "qwen-image": QwenImageBase}  # fmt: skip


def families(*slow: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in BUILT]


LONGER = pytest.mark.parametrize("family", families("flux2", "klein", "qwen-image"), indirect=True)


@pytest.fixture(scope="module", params=families("klein"))
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
    if name in ("flux2", "klein"):
        return {"text": pipe.encode_prompt(prompts)[0]}
    if name == "qwen-image":
        text, there = pipe.encode_prompt(prompts)
        return {"text": text[there.bool()]}
    texts, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return {"text": torch.cat(texts)}


def test_prompts_are_encoded_as_the_pipeline_does(family: tuple[str, Path]):
    name, path = family
    base = load_base(str(path), "cpu")
    assert type(base) is CLASSES[name]
    prompts = ["a photo of the red cat", "a toy"]
    found, expected = base.condition(base.tokenize(prompts)), told(name, base.pipe, prompts)
    if "there" in found:
        found = {"text": found["text"][found["there"].bool()]}
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)
    base.exercise()


def test_the_pipeline_draws_what_euler_steps_of_our_velocity_give(family: tuple[str, Path]):
    """One prompt, two steps without guidance: x <- x + (s' - s) v(x, 1000 s)."""
    name, path = family
    base = load_base(str(path), "cpu")
    pipe, prompt = base.pipe, "a red cat"
    shape = (1, 16, SIDE // 4, SIDE // 4) if name in ("flux2", "klein") else (1, 4, SIDE // 2, SIDE // 2)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    off: dict[str, dict[str, float]] = {name: {"guidance_scale": 1.0} for name in ("sd3", "flux2", "klein")}
    off |= {"flux": {"guidance_scale": 1.0, "max_sequence_length": 20}, "qwen-image": {"true_cfg_scale": 1.0}}
    given = packed(latents) if name in ("flux", "qwen-image") else latents.clone()
    drawn = pipe(
        prompt=prompt, height=SIDE, width=SIDE, num_inference_steps=2, latents=given, output_type="latent",
        **off.get(name, {"guidance_scale": 0.0}),
    ).images  # fmt: skip
    x, condition = latents, base.condition(base.tokenize([prompt]))
    for now, then in zip(pipe.scheduler.sigmas[:-1], pipe.scheduler.sigmas[1:], strict=True):
        x = x + (then - now) * base.denoise(x, now.view(1) * 1000, condition)
    torch.testing.assert_close(base.as_drawn(drawn, SIDE, SIDE), x, rtol=1e-4, atol=1e-4)


@LONGER
def test_a_lora_trains_and_stock_diffusers_draws_the_same(family: tuple[str, Path], photos: Path, tmp_path: Path):
    name, path = family
    kind = "dora" if name == "klein" else "lora"
    task = prepare(job(path, photos, name=kind, class_prompt="a toy" if name == "flux" else None, class_pictures=2))
    shift = {"sd3": 3.0, "z-image": 3.0}.get(name, np.exp(0.5 + 0.65 * (16 - 256) / (4096 - 256)))
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
@pytest.mark.parametrize("family", ["z-image"], indirect=True)  # diffusers loads LoKr into few families
def test_a_lokr_trains_and_stock_diffusers_draws_the_same(family: tuple[str, Path], photos: Path, tmp_path: Path):
    name, path = family
    task = prepare(job(path, photos, name="lokr", rank=1, alpha=3.0, factor=4))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        task(task.batch(step, torch.Generator().manual_seed(step)))[0].backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in task.parameters())
    adapter = task.adapter({})
    adapter.export(tmp_path, "diffusers")
    stock = DiffusionPipeline.from_pretrained(path)
    plain = picture(stock, name)
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert np.abs(plain - picture(task.base.pipe, name)).max() > 1e-4
    np.testing.assert_allclose(picture(stock, name), picture(task.base.pipe, name), atol=1e-5)
    fresh = load_base(str(path), "cpu")
    with load_adapter(tmp_path).attached(fresh):
        np.testing.assert_allclose(picture(fresh.pipe, name), picture(stock, name), atol=1e-5)
    compared = compare(fresh, adapter, side=SIDE)
    assert isinstance(compared, dict) and compared["same"]
    # ai-toolkit's spelling, with an alpha of its own.
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    theirs = {key.replace("transformer.", "diffusion_model."): tensor for key, tensor in tensors.items()}
    theirs |= {f"{key.removesuffix('.lokr_w1')}.alpha": torch.tensor(2.0) for key in theirs if key.endswith(".lokr_w1")}
    save_file(theirs, tmp_path / "theirs.safetensors")
    stock = DiffusionPipeline.from_pretrained(path)
    stock.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    with load_adapter(tmp_path / "theirs.safetensors").attached(fresh):
        np.testing.assert_allclose(picture(fresh.pipe, name), picture(stock, name), atol=1e-5)


@pytest.mark.slow
def test_pictures_of_several_shapes_are_trained_on(family: tuple[str, Path], photos: Path):
    name, path = family
    for i in range(2):
        Image.open(photos / f"{i}.png").rotate(90, expand=True).save(photos / f"{i}.png")
    given = job(path, photos, class_prompt="a toy" if name == "flux" else None, class_pictures=2)
    task = prepare(replace(given, data={**given.data, "buckets": True}))
    shift = {"sd3": 3.0, "z-image": 3.0}.get(name, np.exp(0.5 + 0.65 * (15 - 256) / (4096 - 256)))
    found = [source.objective for source in task.sources]
    assert [each.shift for each in found if isinstance(each, Flow)] == pytest.approx([shift] * len(found))
    shapes = set()
    for step in range(5):
        batch = task.batch(step, torch.Generator().manual_seed(step))
        shapes.add(tuple(batch.mean.shape[-2:]))
        loss, _ = task(batch)
        loss.backward()
        assert bool(loss.isfinite())
    side = 2 if isinstance(task.base, Flux2Base) else 1  # its latents are squares of 2 x 2
    assert shapes == {(6 // side, 10 // side), (10 // side, 6 // side)}


@LONGER
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
    return pipe(prompt="a photo of a toy", generator=generator, num_inference_steps=2, height=SIDE, width=SIDE,
                output_type="np", **short).images[0]  # fmt: skip


@LONGER
def test_words_are_learnt_elsewhere(family: tuple[str, Path], photos: Path):
    _, path = family
    for name in ("textual_inversion", "custom_diffusion"):
        with pytest.raises(InputError, match="Use method lora"):
            prepare(replace(job(path, photos), method={"name": name}))
    with pytest.raises(InputError, match="needs a multiple of 4"):
        load_base(str(path), "cpu").side(18)


@pytest.mark.parametrize("family", families("klein")[3:], indirect=True)
def test_latents_of_flux_2_and_qwen_image_are_the_pipelines(family: tuple[str, Path]):
    """Pictures as the pipelines encode them (FLUX.2) or decode them (Qwen-Image)."""
    name, path = family
    base = load_base(str(path), "cpu")
    pixels = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = base.posterior(pixels)
    if name == "qwen-image":
        config, posterior = base.pipe.vae.config, base.pipe.vae.encode((pixels / 127.5 - 1)[:, :, None]).latent_dist
        spread, middle = (torch.tensor(each).view(-1, 1, 1) for each in (config.latents_std, config.latents_mean))
        torch.testing.assert_close(found["mean"] * spread + middle, posterior.mean[:, :, 0])
        torch.testing.assert_close(found["std"] * spread, posterior.std[:, :, 0])
        return
    expected = base.pipe._encode_vae_image(pixels / 127.5 - 1, torch.Generator())
    torch.testing.assert_close(found["mean"], expected)
    assert found["mean"].shape == (2, 16, SIDE // 4, SIDE // 4) and not found["std"].any()
    if name == "flux2":
        assert torch.equal(base.as_drawn(base.pipe._pack_latents(expected), SIDE, SIDE), expected)
        return
    plain = base.pipe._unpatchify_latents(expected * (base.pipe.vae.bn.running_var + 1e-4).sqrt().view(-1, 1, 1)
                                          + base.pipe.vae.bn.running_mean.view(-1, 1, 1))  # fmt: skip
    torch.testing.assert_close(base.as_drawn(plain, SIDE, SIDE), expected)


@pytest.mark.parametrize("family", ["flux2"], indirect=True)
def test_what_a_family_lacks_is_said(family: tuple[str, Path]):
    base = load_base(str(family[1]), "cpu")
    with pytest.raises(InputError, match="Flux2Pipeline takes none"):
        base.guided(3.0, ["ugly"])
    with pytest.raises(InputError, match="factors of its language model"):
        DiffusionLoRA(text_encoder=True).plan(base.modules)


@pytest.mark.parametrize(
    ("denoiser", "linears", "millions"),
    [(Flux2Transformer2DModel, 128, 77.1), (QwenImageTransformer2DModel, 240, 23.6)],
)
def test_attention_of_a_family_is_what_its_scripts_train(denoiser: type, linears: int, millions: float):
    with torch.device("meta"):
        transformer = denoiser()
    plan = DiffusionLoRA(rank=16).plan({"transformer": transformer})
    assert len(plan) == linears and round(plan.parameters / 1e6, 1) == millions
    assert {site.kind for site in plan} == {"linear"}
    assert [site.name for site in DiffusionDoRA(rank=16).plan({"transformer": transformer})] == [s.name for s in plan]


def test_packing_is_the_pipelines():
    latents = torch.randn(2, 4, 6, 8)
    theirs = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(packed(latents), theirs) and torch.equal(unpacked(theirs, 6, 8), latents)


@LONGER
def test_sdpa_may_be_asked_for(family: tuple[str, Path]):
    assert load_base(str(family[1]), "cpu", attention="sdpa").attention == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "flux2", "klein"], indirect=True)
def test_kohyas_file_of_flux_is_the_same_in_stock_diffusers(family: tuple[str, Path], tmp_path: Path):
    name, path = family
    base = load_base(str(path), "cpu")
    # diffusers' converter has the widths of FLUX.1's fused layers built in, so they are tested elsewhere.
    narrow = (
        r"transformer\.transformer_blocks\.\d+\.attn\.(to|add)_\w+(\.0)?",
        r"single_transformer_blocks\.\d+\.proj_out",
    )
    method = DiffusionLoRA(rank=2, targets=narrow if name == "flux" else "attention")
    handle = method.attach(base.modules)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    tensors, sites = handle.tensors(), handle.plan.to_list()
    handle.detach()
    adapter = Adapter(tensors, Card("lora", to_dict(method), "diffusion", base.name, base.hash, sites, trigger="sks"))
    (file,) = adapter.export(tmp_path, "kohya")
    assert file.name == "kohya.safetensors"
    for each in (adapter, load_adapter(file)):
        told = compare(base, each, file, SIDE)
        assert isinstance(told, dict) and told["file"] == file.name
        assert told["same"] and told["error"] < 1e-4 and told["change"] > 1e-3
