import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture
def sharded_training(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return import_module("sharded_training")


@pytest.mark.alone
def test_two_processes_with_a_sharded_base_train_as_one(sharded_training, tmp_path):
    script = sharded_training.__file__
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), "2", tmp_path], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, told = process.communicate(timeout=240)
        assert process.returncode == 0, told
    for name, method in sharded_training.METHODS.items():
        model = sharded_training.base()
        expected = sharded_training.train(model, sharded_training.attach(method, model), sharded_training.X)
        files = list(tmp_path.glob(f"{name}, *.safetensors"))
        assert len(files) == 4  # two processes, attached before and after sharding
        for file in files:
            for key, tensor in load_file(file).items():
                torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5, msg=f"{file.stem}: {key}")
