"""A rank that dies, or lives on and never comes: the others get an error that says so, within the timeout, from every kind of transfer."""
import json
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


def experts(mesh):
    config = DbrxConfig(d_model=16, n_heads=2, ffn_config=FFNConfig(ffn_hidden_size=8, moe_num_experts=9))
    layer = distributed.expert_parallel(Experts(config), mesh)
    x, indices, weights = torch.randn(4, 16), torch.randint(0, 9, (4, 3), dtype=torch.int32), torch.rand(4, 3)
    return lambda: layer(x, indices, weights).sum().backward()


def tensors(mesh):
    sizes = dict(d_model=18, n_heads=3, n_layers=1, vocab_size=12, attn_config=AttentionConfig(kv_n_heads=3), ffn_config=FFNConfig(ffn_hidden_size=9))
    model, ids = distributed.tensor_parallel(Dbrx(DbrxConfig(**sizes)), mesh), torch.arange(12)[None]
    return lambda: model(ids, labels=ids).loss.backward()


def rows(mesh):
    model, ids = distributed.context_parallel(our_bamba(), mesh), torch.arange(3, 12)[None]
    return lambda: model(ids, labels=ids).loss.backward()


def scan(mesh, H=2):
    args = (torch.randn(1, 9, H, 4, requires_grad=True), torch.rand(1, 9, H), -torch.rand(H), torch.randn(1, 9, 1, 3), torch.randn(1, 9, 1, 3), 8)
    return lambda: distributed.mamba_chunk_scan_combined(*args, mesh=mesh).sum().backward()


def relay(mesh):
    return scan(mesh, H=48)


KINDS = {make.__name__: make for make in (experts, tensors, rows, scan, relay)}


def rank(rank, ranks, folder, dies):
    """Each kind, over a group of its own, is called once on all ranks, and again on all but rank 0: {kind: (seconds, what it raised)} in a file."""
    spawn.start(rank, ranks, 60, folder)
    torch.manual_seed(0)  # the same models on every rank
    dist.barrier()  # ranks may be slow to start; from here on they are in step
    calls = {}
    for kind, make in KINDS.items():
        calls[kind] = make(dist.DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=SECONDS)), "cpu"))
        calls[kind]()
    if rank == 0:
        while not dies and len(list(Path(folder).glob("*.json"))) < ranks - 1:
            time.sleep(0.1)
        os._exit(1)
    found = {}
    for kind, call in calls.items():
        begin = time.perf_counter()
        try:
            call()
            told = "nothing"
        except RuntimeError as error:
            told = str(error)
        found[kind] = time.perf_counter() - begin, told
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)
