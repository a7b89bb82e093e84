"""What GPUs could do at best: the work of every op at model sizes, the time floor it sets on four GPUs, and what bounds it.

floor = max(flops / tensor-core peak, compulsory bytes / bandwidth, launches x LAUNCH_US). Flops and bytes are the formulas of
the benchmark cases, in bfloat16; launches are counted by running the Triton launchers on CPU tensors, nothing being executed.
`terrazzo bench roofline -o docs/roofline.md` writes the tables.
"""
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import terrazzo
from terrazzo import cases, cases_bytes, cases_moe, cases_patches, dispatch
from terrazzo.triton_kernels import runtime

from . import byte_hash_embedding, causal_conv1d, chunk_scan, entropy_patch, grouped_gemm, linear, local_attention, moe
from . import patch_cross_attention, patch_reduce, rmsnorm_gated, state_update
from .roofline import Work

LAUNCH_US = 4.0  # of a kernel launched from Python's side of a stream; a CUDA graph takes most of it away
BF16 = 2         # bytes


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 peak and memory bandwidth, as the vendor states them."""

    name: str
    tflops: float
    tbs: float

    def floor_us(self, work, launches=0):
        """The least time of one call, and which of the three it is: "compute", "memory" or "launches"."""
        limits = {"compute": work.flops / self.tflops / 1e6, "memory": work.bytes / self.tbs / 1e6, "launches": launches * LAUNCH_US}
        bound = max(limits, key=limits.get)
        return limits[bound], bound


A100, H100 = Gpu("A100 SXM 80 GB", 312, 2.039), Gpu("H100 SXM", 989, 3.35)
B200, MI300X = Gpu("B200", 2250, 8.0), Gpu("MI300X", 1307, 5.3)
GPUS = (A100, H100, B200, MI300X)


@dataclass(frozen=True)
class Workload:
    """One call of one op in one layer of a model. mode "bwd": forward and backward together, as in the benchmarks."""

    model: str
    op: str
    size: str
    mode: str
    work: Work
    build: Callable  # of the arguments, see terrazzo.cases
    grads: tuple = ()


def _both(model, op, size, work, build, grads):
    """A forward and a training step of the same call; work(mode)."""
    return [Workload(model, op, size, "fwd", work("fwd"), build), Workload(model, op, size, "bwd", work("bwd"), build, grads)]


def _bamba():
    """9B: width 4096, MLP 14336, 128 heads of 64, state 128: the convolution is 8448 wide, the projection 16768."""
    model, H, P, N, D, CONV, PROJECTION, MLP, L = "Bamba-9B", 128, 64, 128, 4096, 8448, 16768, 14336, 4096
    inner, prefill = H * P, "4096 tokens"
    found = [
        *_both(model, "causal_conv1d_fn", prefill, lambda mode: causal_conv1d.work(CONV, L, BF16, mode),
               cases.conv(B=1, D=CONV, L=L, slack=PROJECTION - CONV - H), cases.CONV_GRADS),
        *_both(model, "mamba_chunk_scan_combined", prefill, lambda mode: chunk_scan.work(L, H, P, N, BF16, mode),
               cases.scan(B=1, L=L, H=H, P=P, G=1, N=N), cases.SCAN_GRADS),
        *_both(model, "rmsnorm_gated", prefill, lambda mode: rmsnorm_gated.work(L, inner, BF16, mode),
               cases.norm(shape=(1, L, inner)), ("x", "weight", "z")),
    ]
    projections = (("in", D, PROJECTION), ("out", inner, D), ("MLP up", D, MLP))
    for name, K, M in projections:
        found += _both(model, "linear", f"{name}, {prefill}", lambda mode, K=K, M=M: linear.work(L, K, M, BF16, mode),
                       cases_moe.linear(shape=(1, L, K), N=M, bias=False), ("x", "weight"))
    for batch in (1, 32):
        step = f"decoding, batch {batch}"
        found += [
            Workload(model, "causal_conv1d_update", step, "decode", causal_conv1d.update_work(batch, CONV, BF16), cases.conv_update(B=batch, D=CONV)),
            Workload(model, "selective_state_update", step, "decode", state_update.work(batch, H, P, N, BF16),
                     cases.state_update(B=batch, H=H, P=P, G=1, N=N, state_dtype=torch.bfloat16)),
            Workload(model, "rmsnorm_gated", step, "decode", rmsnorm_gated.work(batch, inner, BF16), cases.norm(shape=(batch, 1, inner))),
            *(Workload(model, "linear", f"{name}, {step}", "decode", linear.work(batch, K, M, BF16),
                       cases_moe.linear(shape=(batch, 1, K), N=M, bias=False)) for name, K, M in projections),
        ]
    return found


def _experts(model, D, F, E, A, layout):
    """Routing, sorting and the experts; tokens are spread evenly, so that T tokens touch min(E, T A) experts."""
    found = []
    for T in (2048, 32, 1):
        size, mode = (f"{T} tokens", "fwd") if T > 32 else (f"decoding, batch {T}", "decode")
        touched = min(E, T * A)
        build = cases_moe.experts(T=T, D=D, F=F, E=E, A=A, layout=layout)
        found += [
            Workload(model, "moe_route", size, mode, moe.route_work(T, E, A, BF16), cases_moe.route(T=T, E=E, top_k=A, norm_order=1)),
            Workload(model, "moe_permute", size, mode, Work(0, 4 * (3 * T * A + E)), cases_moe.permute(T=T, A=A, E=E)),
            Workload(model, "fused_experts", size, mode, moe.experts_work(T, D, F, A, touched, BF16), build),
        ]
        if T == 2048:
            found.append(Workload(model, "fused_experts", size, "bwd", moe.experts_work(T, D, F, A, touched, BF16, "bwd"), build,
                                  ("x", "w_gate_up", "w_up", "w_down", "topk_weights")))
            found += _both(model, "grouped_mm", f"up, {size}", lambda mode: grouped_gemm.work(E, 2048 * A, D, F, BF16, mode),
                           cases_moe.grouped(sizes=(2048 * A // E,) * E, K=D, N=F, transposed=True), ("a", "b"))
    return found


def _blt():
    """1B: bytes 1024 wide, 16 heads of 64, window 512, 2 rows a patch, patches of 4.5 bytes; an entropy model of 260 symbols."""
    model, L, D, H, P, VOCAB, size = "BLT-1B", 8192, 1024, 16, 64, 20011, "8192 bytes"
    lengths = (3, 4, 5, 6) * 455 + (2,)
    S, K = len(lengths), patch_cross_attention.K
    cut = cases_bytes.lengths(B=1, L=L, threshold=1.335, max_patches=L)
    return [
        *_both(model, "entropy_patch", size, lambda mode: entropy_patch.work(L, BF16, mode),
               cases_bytes.patch(B=1, L=L, threshold=1.335, max_patches=L), ("logits",)),
        Workload(model, "patch_lengths_from_entropies", size, "fwd", Work(0, 13 * L), cut),
        *_both(model, "byte_hash_embedding", size, lambda mode: byte_hash_embedding.work(L, D, VOCAB, BF16, mode),
               cases_bytes.hashes(B=1, L=L, D=D, V=260, vocab=VOCAB, group_sizes=byte_hash_embedding.GROUP_SIZES), ("table", "byte_embedding")),
        *_both(model, "patch_reduce", size, lambda mode: patch_reduce.work(L, S, D, BF16, mode),
               cases_patches.reduce(lengths=(lengths,), S=S, D=D), ("h",)),
        *(w for queries in ("patches", "bytes") for w in
          _both(model, "patch_cross_attention", f"{queries} ask, {size}",
                lambda mode, queries=queries: patch_cross_attention.work(L, S, H, P, queries, BF16, mode),
                cases_patches.cross(queries, lengths=(lengths,), S=S, K=K, H=H, P=P), ("q", "k", "v"))),
        *_both(model, "local_attention", f"window 512, {size}", lambda mode: local_attention.work(L, H, H, P, 512, BF16, mode),
               cases_patches.local(B=1, L=L, H=H, P=P, window=512), ("q", "k", "v")),
    ]  # fmt: skip


def workloads():
    return [*_bamba(), *_experts("DBRX", 6144, 10752, 16, 4, "dbrx"), *_experts("Mixtral", 4096, 14336, 8, 2, "hf"), *_blt()]


# ---- launches ----------------------------------------------------------------------------------------------


@contextmanager
def counting(found, arch="sm90"):
    """Inside the block launchers take CPU tensors as on `arch`, and kernels are named in `found` instead of being compiled and run."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: found.append(self.fn.__name__)
    try:
        with runtime.pretend(arch):
            yield
    finally:
        JITFunction.run = run


def launches(workload):
    """The Triton kernels that the call launches, by name; None where the op has no Triton backend."""
    if "triton" not in dispatch.OPS[workload.op].limits:
        return None
    found = []
    with counting(found):
        cases.run_unwritten(getattr(terrazzo, workload.op), workload.build, torch.bfloat16, workload.grads, "triton")
    return found


# ---- what others have published ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A time that somebody measured and published, at their size and on their GPU."""

    what: str
    gpu: Gpu
    size: str
    us: float
    work: Work
    source: str


def _backward_alone(forward, both):
    return Work(both.flops - forward.flops, both.bytes - forward.bytes)


SOME_H100 = Gpu("H100, variant not said, taken as SXM", H100.tflops, H100.tbs)
# tokens a second of one scan, turned into microseconds
SCAN_SIZE, SCAN_WORK = "4096 tokens, 128 heads of 64, state 128; dtype not said, taken as bfloat16", chunk_scan.work(4096, 128, 64, 128, BF16)
PUBLISHED = (
    Published("mamba_ssm's scan in vLLM, five kernels", SOME_H100, SCAN_SIZE, 4096 / 12.06409, SCAN_WORK, "vllm-project/vllm #27299"),
    Published("the same fused into one kernel", SOME_H100, SCAN_SIZE, 4096 / 20.90137, SCAN_WORK, "vllm-project/vllm #27299"),
    *(Published("mamba_ssm's state update in vLLM, tuned", H100, f"batch {batch}, 128 heads of 64, state 128 in float16, 8 groups", us,
                state_update.work(batch, 128, 64, 128, BF16), "vllm-project/vllm #43083") for batch, us in ((1, 3.62), (32, 55.48))),
    Published("torch grouped_mm", H100, "16 experts, 8192 rows, 5120 x 8192", 1310,
              grouped_gemm.work(16, 8192, 5120, 8192, BF16), "pytorch/ao #2490"),
    Published("torch grouped_mm", H100, "16 experts, 8192 rows, 8192 x 5120", 1260,
              grouped_gemm.work(16, 8192, 8192, 5120, BF16), "pytorch/ao #2490"),
    Published("experts by torch grouped_mm", SOME_H100, "32768 tokens, 2048 x 768, 128 experts, 8 a token", 10218,
              moe.experts_work(32768, 2048, 768, 8, 128, BF16), "ByteDance-Seed/VeOmni #460"),
    Published("experts in Triton", SOME_H100, "32768 tokens, 2048 x 768, 128 experts, 8 a token", 11502,
              moe.experts_work(32768, 2048, 768, 8, 128, BF16), "ByteDance-Seed/VeOmni #460"),
    # the backward alone, which reads x and dy and writes dx: what the training step has above the forward
    Published("causal-conv1d, backward alone", Gpu("RTX PRO 6000 Blackwell", 504, 1.792), "4 x 16384 x 4128, channel first", 1085,
              _backward_alone(*(causal_conv1d.work(4128, 4 * 16384, BF16, mode) for mode in ("fwd", "bwd"))), "Dao-AILab/causal-conv1d #88"),
)  # fmt: skip


# ---- tables ------------------------------------------------------------------------------------------------

HEAD = """# Time floors on GPUs

Written by `terrazzo bench roofline -o docs/roofline.md`; computed, not measured. One call in one layer, bfloat16. The floor is the
largest of flops ÷ peak (**c**), compulsory bytes ÷ bandwidth (**m**) and {launch_us:g} µs a kernel launch (**l**; a CUDA graph takes most
of it away). Flops and bytes are those of the benchmark cases ([benchmarks.md](benchmarks.md)): what no implementation can avoid.
Mode `bwd` is forward and backward together, a training step of the op. Launches are counted in the Triton launchers; "–": no Triton backend.

| GPU | bf16 TFLOP/s, dense | TB/s |
|---|---|---|
{gpus}
"""

PUBLISHED_HEAD = """
## What others publish

Times of other implementations, bfloat16, beside the floor of the same size on the same GPU, launches not counted. Only measurements that state
GPU and size are listed, and what else had to be assumed: an op that isn't here has none that was found.

| what | GPU | size | published | floor | reaches | source |
|---|---|---|---|---|---|---|"""


def _amount(value):
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def row(workload):
    """The cells of a workload, from launches on: one for each GPU, microseconds and the letter of what bounds it."""
    names = launches(workload)
    cells = []
    for gpu in GPUS:
        us, bound = gpu.floor_us(workload.work, len(names or ()))
        cells.append(f"{_amount(us)} {bound[0]}")
    work = workload.work
    return [workload.op, workload.size, workload.mode, _amount(work.flops / 1e9), _amount(work.bytes / 1e6), _amount(work.flops / work.bytes),
            "–" if names is None else str(len(names)), *cells]


COLUMNS = ("op", "size", "mode", "GFLOP", "MB", "flop/byte", "launches", *(f"{gpu.name} µs" for gpu in GPUS))


def document():
    """The text of docs/roofline.md."""
    lines = [HEAD.format(launch_us=LAUNCH_US, gpus="\n".join(f"| {g.name} | {g.tflops:g} | {g.tbs:g} |" for g in GPUS)).rstrip("\n")]
    model = None
    for workload in workloads():
        if workload.model != model:
            model = workload.model
            lines += ["", f"## {model}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines.append(f"| {' | '.join(row(workload))} |")
    lines.append(PUBLISHED_HEAD)
    for p in PUBLISHED:
        floor, bound = p.gpu.floor_us(p.work)
        cells = (p.what, p.gpu.name, p.size, f"{_amount(p.us)} µs", f"{_amount(floor)} µs {bound[0]}", f"{floor / p.us:.0%}", p.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
