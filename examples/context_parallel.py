"""Trains a small Bamba on rows that are cut into stretches over ranks: torchrun --nproc-per-node 2 examples/context_parallel.py --steps 20

FSDP2 shards the weights over the same ranks. Every rank holds a stretch of each row: with more ranks the rows can be longer, and the loss is the same.
"""
import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from terrazzo.distributed import context_parallel
from terrazzo.models import Bamba, BambaConfig
from torch.distributed.fsdp import fully_shard


def parser():
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("text", nargs="?", default=__file__, help="a text file, learnt byte by byte")
    top.add_argument("--steps", type=int, default=20)
    top.add_argument("--length", type=int, default=512, help="bytes of a row, over all ranks (default 512)")
    top.add_argument("--batch", type=int, default=2, help="rows of a step (default 2)")
    top.add_argument("--lr", type=float, default=3e-3)
    return top


def main():
    args = parser().parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = dist.init_device_mesh(device.type, (ranks,))
    torch.manual_seed(0)  # the same model on every rank
    model = Bamba(BambaConfig(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4, attn_layer_indices=(2,), num_attention_heads=4,
                              num_key_value_heads=2, mamba_n_heads=8, mamba_d_state=16)).to(device).train()  # fmt: skip
    context_parallel(model, mesh)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr)
    text = torch.frombuffer(bytearray(Path(args.text).read_bytes()), dtype=torch.uint8).long()
    draw = torch.Generator().manual_seed(1)  # the same rows on every rank
    here = slice(args.length * rank // ranks, args.length * (rank + 1) // ranks)
    for step in range(args.steps):
        begins = torch.randint(len(text) - args.length, (args.batch,), generator=draw).tolist()
        ids = torch.stack([text[begin : begin + args.length] for begin in begins])[:, here].to(device)
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if rank == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
