"""kohya's file: diffusers draws from ours what we draw, and we draw from others what diffusers draws from them."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import FormatError, InputError
from graft.studio.formats import kohya
from graft.studio.formats.low_rank import LowRank, to_adapter
from graft.studio.methods.dora import DoRA
from graft.studio.methods.lora import LoRA

DEEP = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 8, 16), "layers_per_block": 2, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 40}  # fmt: skip
FLAT = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (8, 16),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1}  # fmt: skip


def unet(cross, **settings):
    return UNet2DConditionModel(
        sample_size=4, norm_num_groups=4, cross_attention_dim=cross, attention_head_dim=4, **settings
    )


def text(cls):
    return cls(
        CLIPTextConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8, projection_dim=16, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def sd():
    """A Stable Diffusion in small: 1 x 1 convolutions around its transformers, one text encoder."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), text_encoder=text(CLIPTextModel),
        tokenizer=None, unet=unet(16, **FLAT), safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False,
    )  # fmt: skip
    return frozen(pipe)


def sdxl():
    """An SDXL in small: its three blocks of two layers, two text encoders, added conditions."""
    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), text_encoder=text(CLIPTextModel),
        text_encoder_2=text(CLIPTextModelWithProjection), tokenizer=None, tokenizer_2=None, unet=unet(32, **DEEP),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), add_watermarker=False,
    )  # fmt: skip
    return frozen(pipe)


def frozen(pipe):
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts(pipe):
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def picture(pipe):
    """What the denoiser makes of noise and of the words that all text encoders read."""
    ids, x = torch.arange(8)[None], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words, added = pipe.text_encoder(ids)[0], {}
    if getattr(pipe, "text_encoder_2", None) is not None:
        second = pipe.text_encoder_2(ids, output_hidden_states=True)
        words = torch.cat([words, second.hidden_states[-1]], -1)
        added = {"text_embeds": second.text_embeds, "time_ids": torch.arange(6.0)[None]}
    return pipe.unet(x, torch.tensor([3]), words, added_cond_kwargs=added).sample


def drawn(pipe, adapter):
    handle = LoRA.attach_to(SimpleNamespace(modules=parts(pipe)), adapter.tensors, adapter.card)
    out = picture(pipe)
    handle.detach()
    return out


def trained(pipe, method):
    handle = method.attach(parts(pipe))
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.2)
    handle.detach()
    return Adapter(handle.tensors(), Card("lora", to_dict(method), "diffusion", sites=handle.plan.to_list()))


@pytest.mark.parametrize("make", [sd, sdxl])
@pytest.mark.parametrize("targets", ["attention", ("q", "v"), ("all", "text_projection")])
def test_diffusers_draws_the_same_from_our_export(tmp_path, make, targets):
    pipe = make()
    if "text_projection" in targets and make is sd:
        targets = ("attention", "mlp", "proj_in", "conv1")
    adapter = trained(pipe, LoRA(rank=2, alpha=5, targets=targets))
    expected = drawn(pipe, adapter)
    assert not torch.allclose(expected, picture(pipe), atol=1e-2)
    (file,) = adapter.export(tmp_path, "kohya")
    theirs = make()
    theirs.load_lora_weights(tmp_path, weight_name=file.name)
    torch.testing.assert_close(picture(theirs), expected, rtol=1e-3, atol=1e-4)
    for path in (tmp_path, file):
        torch.testing.assert_close(drawn(make(), load_adapter(path)), expected, rtol=1e-3, atol=1e-4)
    alphas = {float(tensor) for key, tensor in load_file(file).items() if key.endswith(".alpha")}
    assert alphas == {2.0}


def test_we_draw_the_same_from_diffusers_own_kohya_file(tmp_path):
    pipe = sd()
    adapter = trained(pipe, LoRA(rank=2, alpha=2, targets="attention"))
    adapter.export(tmp_path, "diffusers")
    theirs = convert_state_dict_to_kohya(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    save_file({key: tensor.contiguous() for key, tensor in theirs.items()}, tmp_path / "theirs.safetensors")
    torch.testing.assert_close(
        drawn(sd(), load_adapter(tmp_path / "theirs.safetensors")), drawn(pipe, adapter), rtol=1e-3, atol=1e-4
    )


def test_ranks_that_differ_are_the_same_in_diffusers(tmp_path):
    names = [f"unet.{name}" for name, _ in sd().unet.named_modules() if name.endswith(("to_q", "to_v", "conv1"))]
    modules = {}
    for place, name in enumerate(names):
        out, *inside = sd().unet.get_submodule(name.removeprefix("unet.")).weight.shape
        rank = 1 + place % 3
        kind = "conv" if len(inside) > 1 else "linear"
        modules[name] = LowRank(kind, 0.3 * torch.randn(rank, *inside), 0.3 * torch.randn(out, rank))
    adapter = to_adapter(modules, "diffusion", "here")
    adapter.export(tmp_path, "kohya")
    theirs = sd()
    theirs.load_lora_weights(tmp_path, weight_name=kohya.FILE)
    torch.testing.assert_close(picture(theirs), drawn(sd(), adapter), rtol=1e-3, atol=1e-4)


def test_sdxls_own_names_are_read(tmp_path):
    """A file as sd-scripts writes it: blocks numbered as in SDXL's code, an alpha of its own."""
    trained(sdxl(), LoRA(rank=2, alpha=2, targets="all")).export(tmp_path, "kohya")
    own = {diffusers: sdxl for sdxl, diffusers in kohya._SDXL.items()}
    inner = {diffusers: sdxl for sdxl, diffusers in kohya._SDXL_RESNET.items()}
    tensors = {}
    for key, tensor in load_file(tmp_path / kohya.FILE).items():
        short, _, end = key.partition(".")
        begin = next((name for name in own if short.startswith(f"lora_unet_{name}")), None)
        if begin is not None:
            rest = short.removeprefix(f"lora_unet_{begin}")
            short = f"lora_unet_{own[begin]}{inner.get(rest, rest)}"
        tensors[f"{short}.{end}"] = torch.tensor(3.0) if end == "alpha" else tensor
    blocks = {key.split("_")[2] for key in tensors if key.startswith("lora_unet")}
    assert blocks == {"input", "middle", "output", "out", "time", "label"}
    save_file(tensors, tmp_path / "theirs.safetensors")
    theirs = sdxl()
    theirs.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    got = drawn(sdxl(), load_adapter(tmp_path / "theirs.safetensors"))
    torch.testing.assert_close(got, picture(theirs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("alpha", "scale"), [(8.0, 4.0), (1.0, 0.5), (0.0, 1.0), (None, 1.0)])
def test_alpha_is_what_sd_scripts_makes_of_it(tmp_path, alpha, scale):
    down, up = torch.randn(2, 4, 3, 3), torch.randn(4, 2, 1, 1)
    tensors = {"lora_unet_conv_out.lora_down.weight": down, "lora_unet_conv_out.lora_up.weight": up}
    tensors |= {} if alpha is None else {"lora_unet_conv_out.alpha": torch.tensor(alpha)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path)
    assert torch.equal(adapter.tensors["unet.conv_out.A"], down)
    assert torch.equal(adapter.tensors["unet.conv_out.B"], scale * up.flatten(1))


def test_alphas_that_differ_from_module_to_module_are_taken_each_by_itself(tmp_path):
    """Against W + alpha / rank * up down in every module; diffusers up to 0.42.1 drops those of attention layers."""
    torch.manual_seed(1)
    names = ["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.conv_in", "unet.conv_out"]
    names += [f"text_encoder.text_model.encoder.layers.0.{end}" for end in ("self_attn.v_proj", "mlp.fc1")]
    pipe, merged = sd(), sd()
    tensors: dict[str, torch.Tensor] = {}
    for rank, (alpha, name) in enumerate(zip((0.5, 4.0, 1.0, 8.0, 3.0), names, strict=True), 1):
        component, _, path = name.partition(".")
        root = parts(merged)[component]
        path = path if hasattr(root, "text_model") or component == "unet" else path.removeprefix("text_model.")
        weight = root.get_submodule(path).weight
        out, *inside = weight.shape
        down, up = 0.3 * torch.randn(rank, *inside), 0.3 * torch.randn(out, rank, *[1] * (len(inside) - 1))
        weight.add_(alpha / rank * (up.flatten(1) @ down.flatten(1)).view_as(weight))
        short = f"{'lora_unet' if component == 'unet' else 'lora_te'}_{name.partition('.')[2].replace('.', '_')}"
        tensors |= {f"{short}.lora_down.weight": down, f"{short}.lora_up.weight": up}
        tensors[f"{short}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "a.safetensors")
    expected, adapter = picture(merged), load_adapter(tmp_path)
    assert not torch.allclose(picture(pipe), expected, atol=1e-2)
    torch.testing.assert_close(drawn(pipe, adapter), expected, rtol=1e-4, atol=1e-5)
    adapter.export(tmp_path / "again", "kohya")  # one alpha for all, as diffusers needs it
    theirs = sd()
    theirs.load_lora_weights(tmp_path / "again", weight_name=kohya.FILE)
    torch.testing.assert_close(picture(theirs), expected, rtol=1e-3, atol=1e-4)


def test_dora_scales_the_rows_of_the_changed_weight(tmp_path):
    """W' = dora_scale (W + alpha / r B A) / || W + alpha / r B A || of each row, as ComfyUI computes it."""
    pipe, names = sd(), ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in")
    handle = DoRA(rank=2, alpha=5, targets=names).attach(parts(pipe))
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    expected = picture(pipe)
    handle.detach()
    config = to_dict(DoRA(rank=2, alpha=5, targets=names))
    adapter = Adapter(handle.tensors(), Card("dora", config, "diffusion", sites=handle.plan.to_list()))
    (file,) = adapter.export(tmp_path, "kohya")
    tensors = load_file(file)
    with torch.no_grad():
        for name in names:
            weight, short = pipe.unet.get_submodule(name).weight, f"lora_unet_{name.replace('.', '_')}"
            down, up, alpha, length = (
                tensors[f"{short}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
            )
            changed = weight.flatten(1) + alpha / len(down) * up.flatten(1) @ down.flatten(1)
            assert length.shape == (len(weight), *[1] * (weight.dim() - 1))
            changed = length.flatten(1) * changed / changed.norm(dim=1, keepdim=True)
            weight.copy_(changed.view_as(weight))
    torch.testing.assert_close(picture(pipe), expected, rtol=1e-3, atol=1e-4)
    again, fresh = load_adapter(file), sd()
    assert again.card.method == "dora"
    DoRA.attach_to(SimpleNamespace(modules=parts(fresh)), again.tensors, again.card)
    torch.testing.assert_close(picture(fresh), expected, rtol=1e-3, atol=1e-4)


BAD = {
    "lora_unet_down_blocks_0_attentions_0_magic.lora_down.weight": "no module of Stable Diffusion",
    "lora_unet_blocks_0_self_attn_qkv.lora_down.weight": "no module of Stable Diffusion",
    "lora_te3_encoder_block_0.lora_down.weight": "no module of Stable Diffusion",
    "lora_unet_conv_in.hada_w1_a": "not a LoRA factor",
    "lora_unet_conv_in.dora_scale": "a DoRA of the inputs",
    "lora_unet_conv_in.alpha": "an alpha without factors",
}


@pytest.mark.parametrize("key", BAD)
def test_unknown_keys_are_named(tmp_path, key):
    tensors = {
        "lora_unet_conv_out.lora_down.weight": torch.zeros(2, 4),
        "lora_unet_conv_out.lora_up.weight": torch.zeros(4, 2),
    }
    tensors[key] = torch.zeros(2, 4)
    if key.endswith("down.weight"):
        tensors[key.replace("lora_down", "lora_up")] = torch.zeros(4, 2)
    save_file({k: t.clone() for k, t in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=f"{key.split('.')[0]}.*{BAD[key]}"):
        load_adapter(tmp_path)


def test_a_module_named_twice_is_refused(tmp_path):
    name = "text_model_encoder_layers_0_mlp_fc1"
    tensors = {
        f"lora_{te}_{name}.lora_{end}.weight": torch.zeros(2, 2) for te in ("te", "te1") for end in ("up", "down")
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="a module that is named twice"):
        load_adapter(tmp_path)


def test_what_kohya_cannot_express_is_refused(tmp_path):
    other = nn.ModuleDict({"unet": nn.ModuleDict({"strange": nn.Linear(4, 4)}), "text_encoder": nn.Embedding(4, 4)})
    for targets, match in (("strange", "no name for it"), ("text_encoder", "no name for it")):
        method = LoRA(targets=targets)
        handle = method.attach(other)
        adapter = Adapter(handle.tensors(), Card("lora", to_dict(method), sites=handle.plan.to_list()))
        handle.detach()
        with pytest.raises(InputError, match=match):
            adapter.export(tmp_path, "kohya")
    assert list(tmp_path.iterdir()) == []
