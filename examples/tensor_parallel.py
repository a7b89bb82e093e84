"""Trains a small Bamba on a mesh of two dimensions: torchrun --nproc-per-node 4 examples/tensor_parallel.py --tensor 2 --steps 20

Ranks of a row hold one model between them (tensor_parallel); rows have batches of their own and share its parameters out (fully_shard). Rank 0 prints the
mean loss, and at the end what the model goes on with, which all ranks generate together. On GPUs each rank takes one, over NCCL.
"""
import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from terrazzo.distributed import tensor_parallel
from terrazzo.models import Bamba, BambaConfig
from torch.distributed.fsdp import fully_shard


def parser():
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("text", nargs="?", default=__file__, help="a text file, learnt byte by byte")
    top.add_argument("--tensor", type=int, default=2, help="ranks that hold one model between them (default 2); the others are rows with batches of their own")
    top.add_argument("--steps", type=int, default=20)
    top.add_argument("--length", type=int, default=128, help="bytes of a window (default 128)")
    top.add_argument("--batch", type=int, default=4, help="windows of a step in each row (default 4)")
    top.add_argument("--lr", type=float, default=3e-3)
    return top


def main():
    args = parser().parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size() // args.tensor, args.tensor), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)  # the same model on every rank, and the same draws
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, attn_layer_indices=[1], num_attention_heads=4, num_key_value_heads=4)
    model = Bamba(BambaConfig(vocab_size=256, mamba_n_heads=8, mamba_d_state=16, pad_token_id=None, eos_token_id=None, **sizes)).to(device)
    tensor_parallel(model, mesh["tensor"]).train()
    if mesh["data"].size() > 1:
        for block in (*model.model.layers, model):
            fully_shard(block, mesh=mesh["data"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr)
    text = torch.frombuffer(bytearray(Path(args.text).read_bytes()), dtype=torch.uint8).long()
    draw = torch.Generator().manual_seed(1 + mesh["data"].get_local_rank())  # ranks of a row have the same windows
    for step in range(args.steps):
        begins = torch.randint(len(text) - args.length, (args.batch,), generator=draw).tolist()
        ids = torch.stack([text[begin : begin + args.length] for begin in begins]).to(device)
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        mean = loss.detach() / mesh["data"].size()
        dist.all_reduce(mean, group=mesh["data"].get_group())
        if dist.get_rank() == 0:
            print(f"step {step} loss {mean.item():.4f}", flush=True)
    if mesh["data"].size() == 1:
        ids = model.eval().generate(text[None, :16].to(device), 48)
        if dist.get_rank() == 0:
            print(repr(bytes(ids[0].tolist()).decode(errors="replace")))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
