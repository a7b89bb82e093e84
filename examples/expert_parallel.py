"""Trains a small DBRX whose experts are spread over ranks: torchrun --nproc-per-node 2 examples/expert_parallel.py --steps 20

Every rank learns from windows of its own out of the text (default: this file); rank 0 prints the mean loss. On GPUs each rank takes one, over NCCL.
"""
import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from terrazzo.distributed import expert_parallel, reduce_gradients
from terrazzo.models import Dbrx
from terrazzo.models.dbrx import AttentionConfig, DbrxConfig, FFNConfig


def parser():
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("text", nargs="?", default=__file__, help="a text file, learnt byte by byte")
    top.add_argument("--steps", type=int, default=20)
    top.add_argument("--length", type=int, default=128, help="bytes of a window (default 128)")
    top.add_argument("--batch", type=int, default=4, help="windows of a step on each rank (default 4)")
    top.add_argument("--experts", type=int, default=8, help="a multiple of the ranks (default 8)")
    top.add_argument("--chunks", type=int, default=1, help="parts of a step's tokens, of which one travels while another is computed")
    top.add_argument("--lr", type=float, default=3e-3)
    top.add_argument("--out", metavar="DIRECTORY", help="write the model there as safetensors, for examples/generate_on_ranks.py")
    return top


def main():
    args = parser().parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(0)  # the same model on every rank; each keeps its own experts
    ffn = FFNConfig(ffn_hidden_size=64, moe_num_experts=args.experts, moe_top_k=2)
    model = Dbrx(DbrxConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=256, attn_config=AttentionConfig(kv_n_heads=2), ffn_config=ffn)).to(device)
    expert_parallel(model, mesh, chunks=args.chunks).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr)
    text = torch.frombuffer(bytearray(Path(args.text).read_bytes()), dtype=torch.uint8).long()
    draw = torch.Generator().manual_seed(1 + dist.get_rank())
    for step in range(args.steps):
        begins = torch.randint(len(text) - args.length, (args.batch,), generator=draw).tolist()
        ids = torch.stack([text[begin : begin + args.length] for begin in begins]).to(device)
        loss = model(ids, labels=ids, output_router_logits=True).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        reduce_gradients(model, mesh)
        optimiser.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step} loss {mean.item():.4f}", flush=True)
    if args.out:
        model.save_pretrained(args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
