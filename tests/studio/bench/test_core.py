import json

import pytest
import torch
from torch import nn

from graft.studio.bench import core
from graft.studio.bench.core_variants import Variant


@pytest.mark.slow
def test_the_table_compares_equal_work(tmp_path):
    result = core.run(tmp_path, rounds=1, tiny=True)
    saved = json.loads((tmp_path / "core.json").read_text())
    assert saved["checks"] == json.loads(json.dumps(result["checks"])) and set(saved["checks"]) == set(core.LIMITS)
    assert set(saved["models"]) == {"vit", "clip", "unet", "llama", "mha"}
    for model, report in saved["models"].items():
        for name, apart in report["differences"].items():
            if "peft's to the formula" in name:  # which adds the change of out_proj twice
                assert apart["output"] > 1e-3
            else:
                assert max(apart.values()) < (0.1 if "bf16" in name else 1e-3), (model, name)
    for model in ("vit", "clip", "unet", "llama"):  # bytes do not depend on how busy the machine is
        promised = saved["models"][model]["promised"]
        assert promised["dropout saved bytes over peft's"] < 0.9 and promised["DoRA saved bytes over peft's"] < 0.8
    assert "8 adapters over 1" in result["table"] and "limit 0.95" in result["table"]


def test_one_model_alone():
    result = core.run(rounds=1, models="clip", mha=False, tiny=True)
    assert set(result["models"]) == {"clip"} and "MHA step over peft's" not in result["checks"]
    assert all(max(apart.values()) < 0.1 for apart in result["models"]["clip"]["differences"].values())


def test_a_step_leaves_the_inputs_as_they_are():
    x, model = torch.randn(2, 4), nn.Linear(4, 3).requires_grad_(False)
    _, gradients = Variant(model).step((x,), torch.ones(2, 3))
    torch.testing.assert_close(gradients["input"], model.weight.sum(0).expand(2, -1))
    assert not x.requires_grad
