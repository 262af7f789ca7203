"""The core needs torch and safetensors, and what these two import themselves."""

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys

# torch imports all but the last, safetensors that one, to write a file.
OF_TORCH = {"typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec", "numpy"}
KNOWN = sys.stdlib_module_names | OF_TORCH | {"torch", "torchgen", "functorch", "triton", "safetensors", "graft"}


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in KNOWN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
import torch
from graft.studio import adapter, method, sites, slots

files = [module.__file__ for name, module in sys.modules.items() if name.startswith("graft.studio")]
print(f"lines: {sum(len(open(file).readlines()) for file in files)}")
from graft.studio.adapter import Adapter, Card, base_hash, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import InputError
from graft.studio.methods.lora import LoRA
from graft.studio.registry import SITE_METHODS, site_method

for name in SITE_METHODS:
    site_method(name)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).requires_grad_(False)
x, folder = torch.randn(2, 8), sys.argv[1]
method = LoRA(rank=2, targets=("0", "2"))
handle = method.attach(model)
for parameter in handle.bank.parameters():
    torch.nn.init.normal_(parameter)
expected = model(x)
handle.detach()
card = Card("lora", to_dict(method), base_hash=base_hash({"": model}), sites=handle.plan.to_list())
Adapter(handle.tensors(), card).save(folder)
load_adapter(folder).export(folder + "/peft", "peft")
for path in (folder, folder + "/peft"):
    with load_adapter(path).attached(model) as handle:
        assert torch.allclose(model(x), expected, atol=1e-5)
        handle.merge()
        assert torch.allclose(model(x), expected, atol=1e-5)
try:
    load_adapter(folder).card.from_json(card.to_json().replace("method", "methd"), "card")
except Exception as error:
    print(error)
"""


def test_the_core_imports_attaches_saves_loads_and_merges_without_other_packages(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "card.methd: no such key" in done.stdout
    (lines,) = re.findall(r"lines: (\d+)", done.stdout)
    loop = root / "studio" / "loop.py"
    assert int(lines) + len(loop.read_text().splitlines()) < 3000, "the core is to be read in one sitting"
