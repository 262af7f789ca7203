import json

import peft
import pytest
import timm
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import FormatError, InputError
from graft.studio.formats import low_rank
from graft.studio.methods.adalora import AdaLoRA
from graft.studio.methods.dora import DoRA
from graft.studio.methods.ia3 import IA3
from graft.studio.methods.lora import LoRA


class Tokens(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.table, self.conv, self.out = nn.Embedding(11, 4), nn.Conv1d(4, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, ids):
        return self.out(self.conv(self.table(ids).mT).mT)


def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=2, num_classes=3)
    return model.requires_grad_(False).eval()


def tokens():
    torch.manual_seed(0)
    return Tokens().requires_grad_(False)


INPUTS = {vit: torch.randn(2, 3, 32, 32), tokens: torch.randint(11, (2, 7))}


def trained(model, method, domain=""):
    """An adapter with random factors."""
    handle = method.attach(model)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    handle.detach()
    name = type(method).__name__.lower()
    return Adapter(handle.tensors(), Card(name, to_dict(method), domain, sites=handle.plan.to_list()))


def pipeline():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=None, unet=unet, safety_checker=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    for module in (pipe.unet, pipe.text_encoder, pipe.vae):
        module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe):
    """Latents of a whole run, text encoder included."""
    ids = torch.arange(8)[None]
    embeds = pipe.text_encoder(ids)[0]
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros_like(embeds),
        num_inference_steps=2,
        height=8,
        width=8,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (vit, LoRA(rank=3, alpha=7, targets="attention")),  # q, k, v packed in one projection
        (vit, LoRA(rank=3, alpha=7, rslora=True, targets="all")),
        (tokens, LoRA(rank=2, alpha=5, targets=("all", "embedding"))),
    ],
)
def test_peft_gives_the_same_output_from_our_export(tmp_path, make, method):
    model, x = make(), INPUTS[make]
    adapter = trained(model, method)
    adapter.export(tmp_path, "peft")
    with adapter.attached(model):
        expected = model(x)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(theirs(x), expected, rtol=1e-4, atol=1e-5)
    with load_adapter(tmp_path).attached(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "targets"), [(vit, ["qkv", "fc1", "proj"]), (tokens, ["table", "conv", "out"])])
@pytest.mark.parametrize("rslora", [False, True])
def test_we_give_the_same_output_from_pefts_own_file(tmp_path, make, targets, rslora):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora, rank_pattern={targets[0]: 2},
        alpha_pattern={targets[1]: 9}, init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(make(), config).eval()
    theirs.save_pretrained(tmp_path)
    model = make()
    with load_adapter(tmp_path).attached(model):
        torch.testing.assert_close(model(INPUTS[make]), theirs(INPUTS[make]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "targets"), [(LoRA, "attention"), (LoRA, "all"), (DoRA, "all")])
def test_diffusers_draws_the_same_picture_from_our_export(tmp_path, kind, targets):
    pipe = pipeline()
    base = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    before = picture(pipe)
    method = kind(rank=2, alpha=5, targets=targets)
    adapter = trained(base, method, "diffusion")
    handle = kind.attach_to(type("Base", (), {"modules": base}), adapter.tensors, adapter.card)
    expected = picture(pipe)
    handle.detach()
    assert torch.equal(picture(pipe), before)
    assert not torch.allclose(expected, before, atol=1e-2)
    adapter.export(tmp_path, "diffusers")
    theirs = pipeline()
    theirs.load_lora_weights(tmp_path)
    torch.testing.assert_close(picture(theirs), expected, rtol=1e-3, atol=1e-4)
    again = load_adapter(tmp_path)
    assert again.card.method == kind.__name__.lower()
    handle = kind.attach_to(type("Base", (), {"modules": base}), again.tensors, again.card)
    torch.testing.assert_close(picture(pipe), expected, rtol=1e-3, atol=1e-4)
    # Without its header (other programs drop it) the file still says the same.
    save_file(load_file(tmp_path / "pytorch_lora_weights.safetensors"), tmp_path / "bare.safetensors")
    bare = pipeline()
    bare.load_lora_weights(tmp_path, weight_name="bare.safetensors")
    torch.testing.assert_close(picture(bare), expected, rtol=1e-3, atol=1e-4)


def test_we_give_the_same_output_from_diffusers_own_file(tmp_path):
    pipe = pipeline()
    settings = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "conv1"], init_lora_weights=False)
    pipe.unet.add_adapter(settings)
    layers = peft.get_peft_model_state_dict(pipe.unet)
    header = settings.to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=header)
    expected = picture(pipe)
    adapter, ours = load_adapter(tmp_path), pipeline()
    LoRA.attach_to(type("Base", (), {"modules": {"unet": ours.unet}}), adapter.tensors, adapter.card)
    torch.testing.assert_close(picture(ours), expected, rtol=1e-3, atol=1e-4)


def test_earlier_spellings_are_read(tmp_path):
    at = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    names = [
        f"unet.{at}.processor.to_out_lora.down",
        f"unet.{at}.processor.to_q_lora.down",
        f"unet.{at}.to_k.lora.down",
    ]
    names += ["text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down"]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        tensors |= {f"{name}.weight": torch.randn(2, 8), f"{name[:-4]}up.weight": torch.randn(8, 2)}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    assert {site["name"] for site in load_adapter(tmp_path).card.sites} == {
        f"unet.{at}.to_out.0",
        f"unet.{at}.to_q",
        f"unet.{at}.to_k",
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
    }


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("lora", LoRA(rank=2, targets="q")),
        ("adalora", AdaLoRA(rank=3, target_rank=2, targets=("q", "v", "up"))),
        ("ia3", IA3()),
    ],
)
def test_components_become_one_peft_folder_each(tmp_path, name, method):
    pipe, parts = pipeline(), ("unet", "text_encoder")
    inputs = {
        "unet": (torch.randn(1, 4, 4, 4), torch.tensor([3]), torch.randn(1, 8, 16)),
        "text_encoder": (torch.arange(8)[None],),
    }
    handle = method.attach({part: getattr(pipe, part) for part in parts})
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    handle.bank.eval()
    expected = {part: getattr(pipe, part)(*inputs[part])[0] for part in parts}
    handle.detach()
    adapter = Adapter(handle.tensors(), Card(name, to_dict(method), sites=handle.plan.to_list()))
    paths = adapter.export(tmp_path, "peft")
    assert {path.parent for path in paths} == {tmp_path / part for part in parts}
    for part in parts:
        model = getattr(pipe, part)
        assert not torch.allclose(model(*inputs[part])[0], expected[part], atol=1e-3)
        with load_adapter(tmp_path / part).attached(model):
            torch.testing.assert_close(model(*inputs[part])[0], expected[part], rtol=1e-4, atol=1e-5)
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / part)
        torch.testing.assert_close(theirs(*inputs[part])[0], expected[part], rtol=1e-4, atol=1e-5)


def test_what_a_format_cannot_express_is_refused(tmp_path):
    adapter = trained(vit(), LoRA(targets="attention"))
    with pytest.raises(InputError, match="names no component"):
        adapter.export(tmp_path, "diffusers")
    embedding = trained(nn.ModuleDict({"text_encoder": tokens()}), LoRA(targets="embedding"))
    with pytest.raises(InputError, match="no LoRA of an embedding"):
        embedding.export(tmp_path, "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_different_is_an_error():
    adapter = trained(vit(), LoRA(rank=2, targets="attn.proj"))
    modules = low_rank.from_adapter(adapter)
    low_rank.check_written(adapter, modules, "here")
    first = next(iter(modules))
    wrong = low_rank.LowRank("linear", modules[first].down, modules[first].up * 1.00001)
    with pytest.raises(FormatError, match="attn.proj reads back different"):
        low_rank.check_written(adapter, modules | {first: wrong}, "here")
    with pytest.raises(FormatError, match="modules do not match: other"):
        low_rank.check_written(adapter, modules | {"other": wrong}, "here")


def test_peft_files_that_say_more_than_two_factors_are_refused(tmp_path):
    pissa = peft.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights="pissa")
    late = peft.LoraConfig(r=2, target_modules=["fc1"], alora_invocation_tokens=[1])
    for name, config in {"pissa": pissa, "late": late}.items():
        peft.get_peft_model(vit(), config).save_pretrained(tmp_path / name)
        with pytest.raises(FormatError, match="not a plain LoRA"):
            load_adapter(tmp_path / name)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_dora_is_the_same_in_peft_both_ways(tmp_path, targets):
    model, x = vit(), INPUTS[vit]
    method = DoRA(rank=3, alpha=7, targets=targets)
    handle = method.attach(model)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    expected = model(x)
    handle.detach()
    Adapter(handle.tensors(), Card("dora", to_dict(method), sites=handle.plan.to_list())).export(tmp_path, "peft")
    theirs = peft.PeftModel.from_pretrained(vit(), tmp_path)
    torch.testing.assert_close(theirs(x), expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path, tmp_path / "theirs"):
        with load_adapter(folder).attached(model):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_dora_of_some_rows_is_no_dora_of_the_whole_projection(tmp_path):
    method = DoRA(rank=2, targets=("q", "v"))
    handle = method.attach(vit())
    adapter = Adapter(handle.tensors(), Card("dora", to_dict(method), sites=handle.plan.to_list()))
    with pytest.raises(InputError, match="adapt q, k and v together"):
        adapter.export(tmp_path, "peft")


@pytest.mark.parametrize(
    ("make", "method"), [(vit, IA3()), (vit, IA3(targets="patch_embed.proj")), (vit, IA3(inputs=()))]
)
def test_ia3_is_the_same_in_peft_both_ways(tmp_path, make, method):
    model, x = make(), INPUTS[make]
    handle = method.attach(model)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, 1.0, 0.3)
    expected = model(x)
    handle.detach()
    Adapter(handle.tensors(), Card("ia3", to_dict(method), sites=handle.plan.to_list())).export(tmp_path, "peft")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(theirs(x), expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path, tmp_path / "theirs"):
        with load_adapter(folder).attached(model):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_keys_without_a_partner_or_a_component_are_refused(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    file = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(2, 3)}, file)
    with pytest.raises(FormatError, match="a.lora_A.weight: .*without its partner"):
        load_adapter(tmp_path)
    save_file({"base_model.model.a.b.lora_B.weight": torch.zeros(2, 3)}, file)
    with pytest.raises(FormatError, match="its partner is missing"):
        load_adapter(tmp_path)
    save_file({"other.a.lora.down.weight": torch.zeros(2, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="does not begin with a component"):
        load_adapter(tmp_path / "other.safetensors")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(FormatError, match="cannot be read"):
        load_adapter(tmp_path)
