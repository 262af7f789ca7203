"""ControlNets in their authors' layout against diffusers' own converter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import load_file, save_file

from graft.diffusion.controlnet import ControlNet
from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.errors import FormatError
from graft.studio.formats import control_model

TINY: dict[str, Any] = {
    "_class_name": "ControlNetModel", "block_out_channels": [32, 64], "cross_attention_dim": 40, "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 8,
}  # fmt: skip


def adapter_of(network: ControlNetModel, **config: Any) -> Adapter:
    details = {"controlnet": dict(network.config) | {"_class_name": "ControlNetModel"}}
    return Adapter(
        network.state_dict(), Card("controlnet", {"condition": "canny", **config}, "diffusion", details=details)
    )


@pytest.mark.parametrize("width", control_model.CONFIGS)
def test_names_of_every_base_are_those_of_diffusers_converter(width: int):
    """Of Stable Diffusion 1, 2 and XL in full, without their memory; XL's pooled text its converter leaves out."""
    config = control_model.CONFIGS[width]
    with torch.device("meta"):
        network = ControlNetModel.from_config(config)
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    stems = control_model._stems(network.config)
    back = {theirs: ours for ours, theirs in stems.items()}
    inner = {name: ours for ours, name in control_model._RESNET.items()}
    theirs = {control_model._renamed(name, back, inner): each for name, each in network.state_dict().items()}
    assert len(theirs) == len(own) and None not in theirs
    assert {control_model._renamed(str(n), control_model._stems(config), control_model._RESNET) for n in theirs} == set(
        own
    )
    found = convert_controlnet_checkpoint(
        {f"control_model.{name}": each for name, each in theirs.items()}, network.config
    )
    left_out = {name for name in own if name.startswith("add_embedding.")} if width == 2048 else set()
    assert {name: each.shape for name, each in found.items()} | {n: own[n] for n in left_out} == own


def test_a_file_is_read_by_diffusers_and_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    network = ControlNetModel.from_config(TINY)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    adapter = adapter_of(network, scale=0.5)
    (file,) = adapter.export(tmp_path, "kohya")
    theirs = ControlNetModel.from_config(TINY)
    theirs.load_state_dict(convert_controlnet_checkpoint(load_file(file), TINY))
    x, text, hint = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 40), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours, found = (
            net(x, 3, text, hint, conditioning_scale=scale, return_dict=False)
            for net, scale in ((network, 0.5), (theirs, 1.0))
        )
    torch.testing.assert_close(list(found[0]), list(ours[0]))
    torch.testing.assert_close(found[1], ours[1])
    with pytest.raises(FormatError, match="its text is 40 wide"):
        load_adapter(file)
    monkeypatch.setitem(control_model.CONFIGS, 40, TINY)
    read = load_adapter(file)
    assert read.card.config == {"condition": "canny"}
    assert all(torch.equal(tensor, read.tensors[name]) for name, tensor in theirs.state_dict().items())
    save_file(
        {**load_file(file), "control_model.input_blocks.0.1.weight": torch.zeros(1)}, tmp_path / "odd.safetensors"
    )
    with pytest.raises(FormatError, match="no part of a ControlNet"):
        load_adapter(tmp_path / "odd.safetensors")


def test_it_leads_a_denoiser_of_its_shape():
    """What is read goes through the same check as any other network."""
    with torch.device("meta"):
        network = ControlNetModel.from_config(control_model.CONFIGS[768])
        unet = UNet2DConditionModel(cross_attention_dim=768)
    base: Any = type("Base", (), {"name": "sd", "denoiser": unet})()
    assert ControlNet().misfit(network, base) == ""
