"""One process of a training whose base is shared out over processes: python sharded_training.py RANK WORLD FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from graft.studio.adapter import base_hash
from graft.studio.methods.dora import DoRA
from graft.studio.methods.lora import LoRA

METHODS = {"lora": LoRA(rank=2, targets="all-linear"), "dora": DoRA(rank=2, targets="all-linear")}
X = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Packed attention and a feed-forward part."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.fc2(self.fc1(x).relu())


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), Block(), Block()).requires_grad_(False)


def shard(model):
    for block in model[1:]:
        fully_shard(block)
    fully_shard(model)


def attach(method, model):
    torch.manual_seed(2)
    return method.attach(model)


def train(model, handle, x, world=1):
    """Adapters are whole in every process: their gradients are averaged."""
    optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        for parameter in handle.bank.parameters() if world > 1 else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        optimizer.step()
    return handle.tensors()


def main(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for name, method in METHODS.items():
        for order in ("attached first", "sharded first"):
            model = base()
            if order == "sharded first":
                shard(model)
                handle = attach(method, model)
            else:
                handle = attach(method, model)
                shard(model)
            tensors = train(model, handle, X[rank::world], world)
            assert type(next(model[1].parameters())).__name__ == "DTensor"
            handle.detach()
            assert base_hash({"": model}) == base_hash({"": base()})
            save_file(tensors, folder / f"{name}, {order}, {rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
