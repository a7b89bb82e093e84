"""What sharing costs: two ranks with one thread each against one rank with two threads, on the same work. `terrazzo bench ranks`.

The layer of experts (expert_parallel) has half of the tokens and of the experts on each rank, the scan (mamba_chunk_scan_combined over ranks) half of the
sequence. Both sides run by turns, one waiting asleep while the other computes; a case counts only if the ranks' results are one rank's.

Then what cutting the tokens of a call into chunks hides of the time that rows travel: on a link so slow that it takes as long as the whole layer.
"""
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import terrazzo
from terrazzo.distributed import comm
from terrazzo.models.dbrx import DbrxConfig, Experts, FFNConfig

from .moe import choices
from .timer import median

BAR = 0.85  # ranks' speed, as a share of that of one rank with as many threads
SIZES = {"full": dict(tokens=2048, D=1024, F=1792, L=4096, H=128), "quick": dict(tokens=512, D=512, F=896, L=1024, H=64),
         "tiny": dict(tokens=24, D=16, F=8, L=40, H=2)}  # fmt: skip
E, A, P, N = 16, 4, 64, 128
CASES = [(name, mode) for name in ("experts", "scan") for mode in ("fwd", "bwd")]
CHUNKS = (1, 2, 4)


@dataclass
class Result:
    """name and mode ("bwd": forward and backward), seconds of each round on one rank and on several, and whether they agree."""

    name: str
    mode: str
    one: list
    several: list
    why: str = ""

    @property
    def speed(self):
        return median([a / b for a, b in zip(self.one, self.several)])

    @property
    def passed(self):
        return not self.why and self.speed >= BAR

    def record(self):
        return vars(self) | {"speed": self.speed if self.one else None, "passed": self.passed}

    def line(self):
        if self.why:
            return f"{self.name:8} {self.mode:4} WRONG: {self.why}"
        one, several = median(self.one) * 1e3, median(self.several) * 1e3
        verdict = "met" if self.passed else "MISSED"
        return f"{self.name:8} {self.mode:4} one rank {one:8.1f} ms   ranks {several:8.1f} ms   speed {self.speed:.2f} (at least {BAR})   {verdict}"


@dataclass
class Overlap:
    """Of the experts' forward ("fwd") or forward and backward ("bwd") in chunks: seconds of each round without and with a link that takes `link` seconds."""

    mode: str
    chunks: int
    link: float
    without: list
    with_link: list
    why: str = ""  # the ranks don't agree with one

    @property
    def passed(self):
        return not self.why

    @property
    def hidden(self):
        """The share of the link's time that the call does not wait for."""
        return 1 - (median(self.with_link) - median(self.without)) / self.link

    def record(self):
        return vars(self) | {"name": "overlap", "hidden": self.hidden if self.with_link else None, "passed": self.passed}

    def line(self):
        if self.why:
            return f"experts  {self.mode:4} chunks {self.chunks} WRONG: {self.why}"
        without, with_link = median(self.without) * 1e3, median(self.with_link) * 1e3
        return (f"experts  {self.mode:4} chunks {self.chunks} {without:8.1f} ms   on a link of {self.link * 1e3:.1f} ms {with_link:8.1f} ms   "
                f"{max(0.0, self.hidden):.0%} of it hidden")  # fmt: skip


class Linked(comm.Exchange):
    """Rows travel on a link, beside what carries them: one transfer after another, each lasting at least bytes / rate. Waiting takes no processor time."""

    rate, sent, free = float("inf"), 0, 0.0  # of the process: bytes a second; bytes sent; when the last transfer ends

    def begin(self, rows, back=False):
        received, leaving = super().begin(rows, back), self.receive if back else self.send
        size = (sum(leaving) - leaving[self.place]) * rows[:1].nbytes
        Linked.sent += size
        Linked.free = self.due = max(Linked.free, time.perf_counter()) + size / Linked.rate
        return received

    def end(self):
        received = super().end()
        time.sleep(max(0.0, self.due - time.perf_counter()))
        return received


class ExpertLayer:
    """The tokens of this rank through a layer of experts; mesh None: all of both."""

    def __init__(self, size, mesh=None, chunks=1):
        draw = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.layer = Experts(DbrxConfig(d_model=size["D"], n_heads=1, ffn_config=FFNConfig(ffn_hidden_size=size["F"], moe_num_experts=E, moe_top_k=A)))
        for parameter in self.layer.parameters():
            parameter.data.normal_(0, 0.05)
        x, weights = torch.randn(size["tokens"], size["D"], generator=draw), torch.rand(size["tokens"], A, generator=draw)
        indices = choices(size["tokens"], E, A, "balanced", draw)
        here = own(size["tokens"], mesh)
        if mesh is not None:
            terrazzo.distributed.expert_parallel(self.layer, mesh, chunks=chunks)
        self.x, self.rest = x[here].requires_grad_(), (indices[here], weights[here])
        self.leaves = [self.x, *self.layer.parameters()]

    def forward(self):
        return self.layer(self.x, *self.rest)


class Scan:
    """This rank's stretch of a scan; mesh None: the whole sequence."""

    def __init__(self, size, mesh=None):
        draw = torch.Generator().manual_seed(0)
        L, H, here = size["L"], size["H"], own(size["L"], mesh)
        parts = [torch.randn(1, L, *shape, generator=draw) for shape in ((H, P), (H,), (1, N), (1, N))]
        self.leaves = [part[:, here].contiguous().requires_grad_() for part in parts]
        self.A, self.mesh = -torch.rand(H, generator=draw), mesh

    def forward(self):
        x, dt, B, C = self.leaves
        if self.mesh is None:
            return terrazzo.mamba_chunk_scan_combined(x, dt, self.A, B, C, 256, dt_softplus=True)
        return terrazzo.distributed.mamba_chunk_scan_combined(x, dt, self.A, B, C, 256, dt_softplus=True, mesh=self.mesh)


KINDS = {"experts": ExpertLayer, "scan": Scan}


def own(total, mesh):
    """This rank's part of `total` positions."""
    if mesh is None:
        return slice(None)
    rank, ranks = mesh.get_local_rank(), mesh.size()
    return slice(total * rank // ranks, total * (rank + 1) // ranks)


def run(work, mode):
    """One call: (y, the gradient of what comes first, or None)."""
    if mode == "fwd":
        with torch.no_grad():
            return work.forward(), None
    for leaf in work.leaves:
        leaf.grad = None
    y = work.forward()
    y.backward(torch.ones_like(y))
    return y.detach(), work.leaves[0].grad


def _rank(rank, ranks, folder, connection, size):
    """Does what the other end of the connection asks for: ("result" | "time" | "bytes", name, mode, chunks, rate of the link), or None for the end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    mesh, works, comm.Exchange = dist.init_device_mesh("cpu", (ranks,)), {}, Linked
    while (asked := connection.recv()) is not None:
        what, name, mode, chunks, Linked.rate = asked
        if (name, chunks) not in works:
            works = {(name, chunks): ExpertLayer(size, mesh, chunks) if name == "experts" else Scan(size, mesh)}
        Linked.sent = 0
        dist.barrier()
        begin = time.perf_counter()
        found = run(works[name, chunks], mode)
        dist.barrier()
        seconds = time.perf_counter() - begin
        connection.send({"result": found, "time": seconds, "bytes": Linked.sent}[what])
    dist.destroy_process_group()


class Ranks:
    """Processes that run the cases together; as a context manager."""

    def __init__(self, ranks, size):
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        pairs = [context.Pipe() for _ in range(ranks)]
        self.ends = [pair[0] for pair in pairs]
        self.processes = [context.Process(target=_rank, args=(rank, ranks, self.folder.name, pair[1], size), daemon=True) for rank, pair in enumerate(pairs)]
        for process in self.processes:
            process.start()
        for _, other in pairs:
            other.close()  # so that a rank's end is noticed

    def ask(self, what, name, mode, chunks=1, rate=float("inf")):
        """Every rank's answer."""
        for end in self.ends:
            end.send((what, name, mode, chunks, rate))
        return [end.recv() for end in self.ends]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for end in self.ends:
            if error[0] is None:
                end.send(None)
            end.close()
        for process in self.processes:
            process.join(30)
        self.folder.cleanup()


def disagreement(results, expected):
    """"" or how what the ranks computed, [(y, gradient or None)], differs from one rank's."""
    for what, parts, whole in zip(("y", "gradient"), zip(*results), expected):
        if whole is not None:
            error, most = (torch.cat(parts, 1 if whole.dim() == 4 else 0) - whole).abs().max().item(), whole.abs().max().item()
            if not error <= 1e-4 * most:
                return f"{what} is off by {error:.2g}, of values up to {most:.2g}"
    return ""


def measure(size, rounds, ranks=2, on_result=None):
    """[Result] of every case, then [Overlap]."""
    threads = torch.get_num_threads()
    torch.set_num_threads(ranks)
    found = []
    try:
        with Ranks(ranks, size) as several:
            for result in chain(speeds(several, size, rounds), overlaps(several, size, min(rounds, 5))):
                found.append(result)
                if on_result:
                    on_result(result)
    finally:
        torch.set_num_threads(threads)
    return found


def speeds(several, size, rounds):
    for name, mode in CASES:
        work = KINDS[name](size)
        result = Result(name, mode, [], [])
        result.why = disagreement(several.ask("result", name, mode), run(work, mode))
        for _ in range(0 if result.why else rounds):
            begin = time.perf_counter()
            run(work, mode)
            result.one.append(time.perf_counter() - begin)
            time.sleep(0.02)  # this rank's threads stop waiting for work
            result.several.append(max(several.ask("time", name, mode)))
        yield result


def overlaps(several, size, rounds):
    for mode in ("fwd", "bwd"):
        seconds = median([max(several.ask("time", "experts", mode)) for _ in range(rounds + 1)][1:])
        rate = max(several.ask("bytes", "experts", mode)) / seconds
        expected = run(ExpertLayer(size), mode)
        for chunks in CHUNKS if rate else ():  # one rank sends nothing
            result = Overlap(mode, chunks, seconds, [], [], disagreement(several.ask("result", "experts", mode, chunks), expected))
            for _ in range(0 if result.why else rounds):
                result.without.append(max(several.ask("time", "experts", mode, chunks)))
                result.with_link.append(max(several.ask("time", "experts", mode, chunks, rate)))
            yield result


def restart_asleep(argv):
    """Starts over with threads that sleep while they wait, unless they do: a waiting thread must not take a core from the other side."""
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        os.execve(sys.executable, [sys.executable, "-m", "terrazzo.bench", *argv], os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
