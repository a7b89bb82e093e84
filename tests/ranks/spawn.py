"""Runs checks on several gloo ranks: one spawn, many checks."""
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from terrazzo import tolerance


def run(module, names, ranks, seconds=30):
    """Calls the functions check(mesh) of the module `module` in turn on every rank; fails with what each rank said of the first one that failed."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (module, names, ranks, seconds, folder), ranks)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    wrong = [f"{name} on rank {rank}: {found[rank][name]}" for name in names for rank in range(ranks) if found[rank][name]]
    assert not wrong, "\n".join(wrong)


def _rank(rank, module, names, ranks, seconds, folder):
    checks = importlib.import_module(module)
    start(rank, ranks, seconds, folder)
    mesh = dist.init_device_mesh("cpu", (ranks,), mesh_dim_names=("ranks",))
    found = dict.fromkeys(names, "not reached")
    for name in names:
        torch.manual_seed(0)
        begin = time.perf_counter()
        try:
            getattr(checks, name)(mesh)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
            break  # and leave: the other ranks, which may wait for this one, learn it from its closed connections
        if rank == 0:
            print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    if not any(found.values()):
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # at once: without the group's farewell, for which others would have to be there


def start(rank, ranks, seconds, folder):
    """One thread, uninitialised memory is NaN, and gloo with a timeout."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))


@contextmanager
def replaced(owner, name, value):
    """Inside, owner.name is `value`."""
    original = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def close(name, out, expected64, *expected, whole_model=False):
    """The tolerance rule: `out` against one rank's result in float64 and in out's dtype; of several such (of two backends) the one with the larger error:
    gradients of few numbers would be judged by chance else."""
    expected64 = expected64.detach()
    expected = max((each.detach() for each in expected), key=lambda each: (each.double() - expected64).abs().amax().item() if each.numel() else 0.0)
    verdict = tolerance.check(out.detach(), expected64, expected, whole_model)
    assert verdict.ok, f"{name}: {verdict.why}"
