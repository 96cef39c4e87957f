"""Run by test_sharded.py: a model whose parameters FSDP2 shards over two processes of a CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def run(rank: int, store: str, backend: str) -> None:
    """One process: the sharded model gives what the whole one does, to the bit."""
    sys.path.insert(0, str(Path(__file__).parent))
    from tiny_specs import SPECS
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import moegen

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    make: Any = moegen.module(SPECS["plain-moe"], ["model.layers=1"], backend=backend).Model
    plain, model = make(), make()
    model.load_state_dict(plain.state_dict())
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = torch.randint(0, 61, (1, 8))  # the same in both, so that the mean of gradients is one's
    logits = []
    for one in (plain, model):
        out = one(ids)
        out.logits.square().mean().backward()
        logits.append(out.logits.detach())
    assert torch.equal(*logits)
    shards = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert shards[name].to_local().numel() < parameter.numel(), name
        assert torch.equal(shards[name].grad.full_tensor(), parameter.grad), name
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, args=tuple(sys.argv[1:3]), nprocs=WORLD)  # type: ignore[no-untyped-call]
    print("equal")
