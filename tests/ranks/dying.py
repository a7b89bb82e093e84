"""A rank that dies between two calls, or lives on and never comes to the second: the others get an error that says so, within the timeout."""
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import spawn
from ranks.rows import our_bamba
from terrazzo import distributed
from terrazzo.models import Dbrx
from terrazzo.models.dbrx import AttentionConfig, DbrxConfig, Experts, FFNConfig

SECONDS = 5


def rank(rank, ranks, folder, kind):
    spawn.start(rank, ranks, 60, folder)
    torch.manual_seed(0)  # the same model on every rank
    dist.barrier()  # ranks may be slow to start; from here on they are in step
    mesh = dist.DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=SECONDS)), "cpu")
    if "experts" in kind:
        config = DbrxConfig(d_model=16, n_heads=2, ffn_config=FFNConfig(ffn_hidden_size=8, moe_num_experts=9))
        layer = distributed.expert_parallel(Experts(config), mesh)
        x, indices, weights = torch.randn(4, 16), torch.randint(0, 9, (4, 3), dtype=torch.int32), torch.rand(4, 3)

        def call():
            layer(x, indices, weights).sum().backward()
    elif kind == "tensors":
        sizes = dict(d_model=18, n_heads=3, n_layers=1, vocab_size=12, attn_config=AttentionConfig(kv_n_heads=3), ffn_config=FFNConfig(ffn_hidden_size=9))
        torch.manual_seed(0)
        model, ids = distributed.tensor_parallel(Dbrx(DbrxConfig(**sizes)), mesh), torch.arange(12)[None]

        def call():
            model(ids, labels=ids).loss.backward()
    elif "rows" in kind:
        model = distributed.context_parallel(our_bamba(), mesh)
        ids = torch.arange(3, 12)[None]

        def call():
            model(ids, labels=ids).loss.backward()
    else:
        H = 48 if kind == "relay" else 2
        args = (torch.randn(1, 9, H, 4, requires_grad=True), torch.rand(1, 9, H), -torch.rand(H), torch.randn(1, 9, 1, 3), torch.randn(1, 9, 1, 3), 8)

        def call():
            distributed.mamba_chunk_scan_combined(*args, mesh=mesh).sum().backward()
    call()
    if rank == 0:
        while "never comes" in kind and len(list(Path(folder).glob("*.txt"))) < ranks - 1:
            time.sleep(0.1)
        os._exit(1)
    begin = time.perf_counter()
    try:
        call()
        told = "nothing"
    except RuntimeError as error:
        told = str(error)
    Path(folder, f"{rank}.txt").write_text(f"{time.perf_counter() - begin:.2f}\n{told}")
    os._exit(0)
