"""Files of all libraries, through the command line and to models that spell their modules otherwise."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from graft.studio.adapter import load_adapter
from graft.studio.cli import main
from graft.studio.errors import FormatError, SiteError
from graft.studio.formats.low_rank import LowRank, to_adapter

LLAMA = [f"model.layers.0.self_attn.{name}_proj" for name in "vo"]
SD = [f"text_encoder.text_model.encoder.layers.0.self_attn.{name}_proj" for name in "qv"]


@pytest.mark.parametrize(
    ("format", "names"), [("diffusers", SD), ("kohya", SD), ("loralib", SD), ("peft", LLAMA), ("torchtune", LLAMA)]
)
def test_the_command_line_converts_and_recognises_it(tmp_path, capsys, format, names):
    modules = {name: LowRank("linear", torch.randn(2, 6), torch.randn(4, 2)) for name in names}
    to_adapter(modules, "", "here").save(tmp_path / "native")
    assert main(["adapters", "convert", str(tmp_path / "native"), str(tmp_path / "out"), "--to", format, "--json"]) == 0
    assert main(["adapters", "convert", str(tmp_path / "out"), str(tmp_path / "back"), "--to", "native", "--json"]) == 0
    capsys.readouterr()
    for path in (tmp_path / "out", tmp_path / "back"):
        assert main(["adapters", "inspect", str(path), "--json"]) == 0
        card = json.loads(capsys.readouterr().out)
        assert (card["method"], {site["name"] for site in card["sites"]}) == ("lora", set(names))
        tensors = load_adapter(path).tensors
        for name, module in modules.items():
            torch.testing.assert_close(tensors[f"{name}.B"] @ tensors[f"{name}.A"], module.delta)


def test_a_folder_with_several_files_is_asked_about(tmp_path):
    for name in ("a", "b"):
        save_file({"x.lora_A": torch.zeros(1, 1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match="not one alone .*a.safetensors, b.safetensors"):
        load_adapter(tmp_path)


def test_text_model_is_found_where_transformers_has_taken_it_out(tmp_path):
    adapter = to_adapter(
        {"text_encoder.text_model.fc": LowRank("linear", torch.ones(1, 2), torch.ones(3, 1))}, "", "here"
    )
    flat = nn.ModuleDict({"text_encoder": nn.ModuleDict({"fc": nn.Linear(2, 3)})})
    deep = nn.ModuleDict({"text_encoder": nn.ModuleDict({"text_model": nn.ModuleDict({"fc": nn.Linear(2, 3)})})})
    for model in (flat, deep):
        with adapter.attached(model) as handle:
            assert list(handle.tensors()) == [f"{handle.plan.sites[0].name}.{name}" for name in "AB"]
    with (
        pytest.raises(SiteError, match="text_encoder.text_model.fc: the model has no such module"),
        adapter.attached(nn.ModuleDict({"fc": nn.Linear(2, 3)})),
    ):
        pass
