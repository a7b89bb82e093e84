"""Generates with a DBRX whose experts are spread over ranks: torchrun --nproc-per-node 2 examples/generate_on_ranks.py DIRECTORY "def main" "import"

DIRECTORY is a checkpoint; of the experts each rank reads its own alone. Prompts are dealt to the ranks, which generate at once: every token goes through
experts of all ranks, so all ranks run equally many steps. Texts are bytes, as examples/expert_parallel.py learns them and writes with --out.
"""
import argparse
import os

import torch
import torch.distributed as dist
from terrazzo.distributed import expert_parallel
from terrazzo.models import Dbrx


def parser():
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("directory")
    top.add_argument("prompts", nargs="+", help="rank r answers the prompts r, r + ranks, ...; ranks without one help the others")
    top.add_argument("--tokens", type=int, default=32, help="bytes to generate (default 32)")
    return top


def main():
    args = parser().parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = dist.init_device_mesh(device.type, (ranks,))
    model = Dbrx.from_pretrained(args.directory, device=device, shard=lambda whole: expert_parallel(whole, mesh))
    answers = {}
    for begin in range(0, len(args.prompts), ranks):
        mine = args.prompts[begin + rank : begin + rank + 1]
        ids = torch.tensor([list((mine or ["\n"])[0].encode())], device=device)
        tokens = model.generate(ids, args.tokens, eos_token_id=[])  # no token ends a text: nobody stops before the others
        if mine:
            answers[begin + rank] = bytes(tokens[0].tolist()).decode(errors="replace")
    gathered = [None] * ranks
    dist.all_gather_object(gathered, answers)
    if rank == 0:
        print(*(text for _, text in sorted(pair for each in gathered for pair in each.items())), sep="\n---\n", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
