"""Checks of context parallelism, run on every rank: each computes the whole sequence alone and compares its stretch, gradients included."""
import importlib
from functools import partial

import pytest
import terrazzo
import torch
import torch.distributed as dist
from ranks.spawn import close, replaced
from terrazzo import distributed

context_parallel = importlib.import_module("terrazzo.distributed.context_parallel")  # a function of the package has the name too

H, P, G, N, D = 4, 5, 2, 7, 6
LENGTHS = [11, 5, 8, 17]  # of the stretches
SHORT = [2, 1, 1, 4]      # some shorter than the W - 1 inputs that a convolution looks back


def stretch(mesh, lengths):
    rank = mesh.get_local_rank()
    begin = sum(lengths[:rank])
    return slice(begin, begin + lengths[rank])


def rows_of_ids(L, kind, borders):
    """(2, L) int32 packed sequences, or None."""
    if kind is None:
        return None
    ids = torch.zeros(2, L, dtype=torch.int32)
    if kind == "inside":  # changes in the midst of stretches; the second row's first sequence spans a border, its last one too
        ids[0, borders[0] // 2 :] = 1
        ids[0, borders[0] + 2 :] = 2
        ids[1, borders[0] + 1 :] = 5
    elif kind == "borders":  # a change exactly at every border in row 0, none at all in row 1
        for border in borders:
            ids[0, border:] += 1
    elif kind == "padding":  # over the first border, and the whole rest of row 1
        ids[0, borders[0] - 1 : borders[0] + 1] = -1
        ids[0, borders[0] + 1 :] = 3
        ids[1, borders[0] :] = -1
    elif kind == "same_number_again":  # 0 1 0: another sequence in spite of its number
        ids[0, borders[0] - 2 : borders[0] - 1] = 1
        ids[1, borders[0] - 1 : borders[0]] = 1
    return ids


KINDS = [None, "inside", "borders", "padding", "same_number_again"]


def compare(mesh, lengths, sharded, shared, run_whole, run_here, axis):
    """Outputs and gradients of `sharded` (cut along `axis`) and `shared` (summed over ranks) tensors against one rank's, by the tolerance rule."""
    cut, last = (*[slice(None)] * axis, stretch(mesh, lengths)), mesh.get_local_rank() == mesh.size() - 1
    x = next(iter(sharded.values()))
    whole_dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype)

    def results(run, precision, own):
        """Of all ranks or of one: y, the state at the end where this is the last rank, and the gradients of a loss of both."""
        leaves = {name: t[cut] if own else t for name, t in sharded.items()} | shared
        leaves = {name: t.detach().to(precision or t.dtype).requires_grad_() for name, t in leaves.items()}
        y, state = run(**leaves)
        dy, outputs = whole_dy[cut] if own else whole_dy, [y, state] if last or not own else [y]
        torch.autograd.backward(outputs, [dy.to(y.dtype), torch.full_like(state, 0.25)][: len(outputs)])
        return leaves, y, state

    mine, y, state = results(run_here, None, True)
    for name in shared:
        dist.all_reduce(mine[name].grad)
    found = [y, state, *(t.grad for t in mine.values())]
    expected = []
    for precision in (torch.float64, None):
        with terrazzo.use_backend("reference"):
            whole, y, state = results(run_whole, precision, False)
        expected.append([y[cut], state, *(t.grad if name in shared else t.grad[cut] for name, t in whole.items())])
    for name, *values in zip(["y", "state", *("d" + name for name in mine)], found, *expected, strict=True):
        if name != "state" or last:
            close(name, *values)


def conv_exact(mesh, lengths, kind=None, width=4, dtype=torch.float32, channel_last=False):
    lengths = lengths[: mesh.size()]
    L, borders = sum(lengths), torch.tensor(lengths).cumsum(0)[:-1].tolist()
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, D, L, generator=draw).to(dtype)
    sharded = {"x": x.transpose(1, 2).contiguous().transpose(1, 2) if channel_last else x}
    shared = {"weight": torch.randn(D, width, generator=draw).to(dtype), "bias": torch.randn(D, generator=draw).to(dtype)}
    ids = rows_of_ids(L, kind, borders)
    mine = None if ids is None else ids[:, stretch(mesh, lengths)]
    options = dict(return_final_states=True, activation="silu")
    compare(mesh, lengths, sharded, shared, lambda **t: terrazzo.causal_conv1d_fn(**t, seq_idx=ids, **options),
            lambda **t: distributed.causal_conv1d_fn(**t, seq_idx=mine, mesh=mesh, **options), axis=2)


def scan_exact(mesh, lengths, kind=None, dtype=torch.float32, steep=1.0, H=H, G=G, wide_D=False):
    lengths = lengths[: mesh.size()]
    L, borders = sum(lengths), torch.tensor(lengths).cumsum(0)[:-1].tolist()
    draw = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(*shape, generator=draw).to(dtype)

    sharded = {"x": random(2, L, H, P), "dt": random(2, L, H), "B": random(2, L, G, N), "C": random(2, L, G, N), "z": random(2, L, H, P)}
    shared = {"A": -steep * torch.rand(H, generator=draw), "D": torch.randn(*(H, P) if wide_D else (H,), generator=draw), "dt_bias": torch.randn(H, generator=draw)}
    shared = {name: t.double() if dtype == torch.float64 else t for name, t in shared.items()}  # models keep them in float32
    ids = rows_of_ids(L, kind, borders)
    mine = None if ids is None else ids[:, stretch(mesh, lengths)]
    options = dict(chunk_size=4, dt_softplus=True, dt_limit=(0.01, 3.0), return_final_states=True)
    compare(mesh, lengths, sharded, shared, lambda **t: terrazzo.mamba_chunk_scan_combined(**t, seq_idx=ids, **options),
            lambda **t: distributed.mamba_chunk_scan_combined(**t, seq_idx=mine, mesh=mesh, **options), axis=1)


def conv(mesh):
    for kind in KINDS:
        conv_exact(mesh, LENGTHS, kind)
    conv_exact(mesh, LENGTHS, width=2)
    conv_exact(mesh, LENGTHS, channel_last=True)


def conv_of_short_stretches(mesh):
    for kind in KINDS:
        conv_exact(mesh, SHORT, kind)
        conv_exact(mesh, SHORT, kind, width=6)


def conv_dtypes(mesh):
    conv_exact(mesh, LENGTHS, "inside", dtype=torch.float64)
    conv_exact(mesh, LENGTHS, "inside", dtype=torch.bfloat16)


def scan(mesh):
    for kind in KINDS:
        scan_exact(mesh, LENGTHS, kind)
    scan_exact(mesh, [70, 130, 65, 64])


def scan_of_short_stretches(mesh):
    for kind in KINDS:
        scan_exact(mesh, SHORT, kind)


def scan_dtypes(mesh):
    scan_exact(mesh, LENGTHS, "inside", dtype=torch.float64)
    scan_exact(mesh, LENGTHS, "inside", dtype=torch.bfloat16)


def scan_with_huge_steps(mesh):
    """States that decay to nothing within a stretch, where a difference of sums would have no digits left."""
    scan_exact(mesh, LENGTHS, steep=300.0)


# heads and groups of scans that are relayed in blocks of 2 heads, on two ranks and on four: inside groups (an odd number too), or of whole ones
RELAYED = [dict(H=24, G=2), dict(H=15, G=1), dict(H=14, G=14), dict(H=21, G=7)]


def relay_of_small_blocks():
    return replaced(context_parallel, "BLOCK", 2)


def relay(mesh):
    with relay_of_small_blocks():
        for sizes in RELAYED:
            for kind in KINDS:
                scan_exact(mesh, LENGTHS, kind, **sizes)
        scan_exact(mesh, [70, 130, 65, 64], wide_D=True, **RELAYED[0])


def relay_of_short_stretches(mesh):
    with relay_of_small_blocks():
        for kind in KINDS:
            scan_exact(mesh, SHORT, kind, **RELAYED[0])


def relay_dtypes(mesh):
    with relay_of_small_blocks():
        for sizes in RELAYED:
            scan_exact(mesh, LENGTHS, "inside", dtype=torch.float64, **sizes)
            scan_exact(mesh, LENGTHS, "inside", dtype=torch.bfloat16, **sizes)
        scan_exact(mesh, LENGTHS, steep=300.0, **RELAYED[0])


def scan_arguments(L, H, G):
    draw = torch.Generator().manual_seed(2)
    parts = [torch.randn(1, L, *shape, generator=draw) for shape in ((H, P), (H,), (G, N), (G, N))]
    return parts[0], parts[1], -torch.rand(H, generator=draw), parts[2], parts[3], 8


def relay_for_inference(mesh):
    """Without gradients the gate is the kernel's: the same y and states."""
    args, found = scan_arguments(9, 56, 1), []
    for x in (args[0], args[0].clone().requires_grad_()):
        y, states = distributed.mamba_chunk_scan_combined(x, *args[1:], z=args[0], dt_softplus=True, return_final_states=True, mesh=mesh)
        assert y.requires_grad == x.requires_grad
        found.append((y.detach(), states.detach()))
    for inference, training in zip(*found, strict=True):
        torch.testing.assert_close(inference, training)


def blocks_follow_each_other(mesh):
    """A block's states leave before the next block is scanned, forward and backward; few blocks on many ranks, and other backends, aren't relayed."""
    events, here = [], (mesh.get_local_rank() < mesh.size() - 1, mesh.get_local_rank() > 0)
    give = distributed.comm.Relay.give

    def kernels_run():
        counts = terrazzo.counters()
        return tuple(counts.get(name, {}).get("cpu", 0) for name in ("mamba_chunk_scan_combined", "mamba_chunk_scan_combined_bwd"))

    def watched(self, part):
        events.append(kernels_run())
        give(self, part)

    def run(heads, backend=None):
        terrazzo.reset_counters()
        events.clear()
        x, *args = scan_arguments(9, heads, 1)
        distributed.mamba_chunk_scan_combined(x.requires_grad_(), *args, mesh=mesh, backend=backend).sum().backward()

    with replaced(distributed.comm.Relay, "give", watched):
        run(56)
        forward, backward = [(n, 0) for n in range(1, 8)], [(7, n) for n in range(1, 8)]
        assert events == forward + backward * here[1] and kernels_run() == (7, 7)
        run(8 * 2 * (mesh.size() - 1))
        assert not events and kernels_run() == (1, 1)
        run(56, "reference")
        assert not events


def threads_make_blocks_larger(mesh):
    """All ranks cut alike, by the most threads that one has when a group is first used."""
    group = dist.new_group()
    line = distributed.comm.Line(group, mesh.get_local_rank(), mesh.size(), "")
    torch.set_num_threads(3 if mesh.get_local_rank() == 1 else 1)
    try:
        assert line.threads() == 3
    finally:
        torch.set_num_threads(1)
    assert line.threads() == 3
    cut = context_parallel._blocks
    assert [heads.stop - heads.start for heads, _ in cut(56, 1, 24)] == [24, 24, 8]
    assert cut(6, 3, 4) == [(slice(0, 4), slice(0, 2)), (slice(4, 6), slice(2, 3))]
    assert cut(6, 2, 2) == [(slice(0, 2), slice(0, 1)), (slice(2, 3), slice(0, 1)), (slice(3, 5), slice(1, 2)), (slice(5, 6), slice(1, 2))]


class Deaf:
    """A relay on which nothing comes or goes."""

    def __init__(self, line, step, parts):
        pass

    def take(self):
        return None

    def give(self, part):
        pass

    end = take


def a_lost_state_shows(mesh):
    """The comparison fails on every rank but the first when ranks scan from zero, and when a convolution has no halo."""
    lengths = LENGTHS[: mesh.size()]
    with replaced(distributed.comm.Line, "shift", lambda self, tensor, step, received=None: received), replaced(distributed.comm, "Relay", Deaf):
        for check in (conv_exact, scan_exact, partial(scan_exact, H=56, G=1)):
            if mesh.get_local_rank() == 0:
                with pytest.raises(AssertionError, match="^d"):  # its outputs are right: what flows back is missing
                    check(mesh, lengths)
            else:
                with pytest.raises(AssertionError, match="^y"):
                    check(mesh, lengths)


def bytes_do_not_depend_on_the_length(mesh):
    rank, last = mesh.get_local_rank(), mesh.size() - 1
    assert (distributed.volume.halo(2, D, 4, 4), distributed.volume.states(2, H, P, N)) == (4 * 2 * D * 3, 4 * 2 * H * P * N)
    for L, heads in ((16, H), (256, H), (16, 56), (256, 56)):
        x, weight = torch.randn(2, D, L, requires_grad=True), torch.randn(D, 4)
        ids = torch.zeros(2, L, dtype=torch.int32)
        distributed.reset_traffic()
        y = distributed.causal_conv1d_fn(x, weight, mesh=mesh)
        halo = distributed.volume.halo(2, D, 4, 4)
        assert distributed.traffic().get("convolution halo", 0) == halo * (rank < last)
        y.sum().backward()
        assert distributed.traffic()["convolution halo"] == halo * ((rank < last) + (rank > 0))
        args = (torch.randn(2, L, heads, P, requires_grad=True), torch.rand(2, L, heads), -torch.rand(heads), torch.randn(2, L, G, N), torch.randn(2, L, G, N), 8)
        states = distributed.volume.states(2, heads, P, N)
        distributed.reset_traffic()
        y = distributed.mamba_chunk_scan_combined(*args, mesh=mesh)
        assert distributed.traffic().get("scan states", 0) == states * (rank < last)
        y.sum().backward()
        assert distributed.traffic()["scan states"] == states * ((rank < last) + (rank > 0))
        distributed.reset_traffic()
        distributed.mamba_chunk_scan_combined(*args, seq_idx=ids, mesh=mesh)
        assert distributed.traffic().get("scan states", 0) == (states + distributed.volume.packed(2)) * (rank < last)


def bad_input(mesh):
    """Refused on every rank before any message."""
    distributed.reset_traffic()
    x, weight = torch.randn(1, D, 9), torch.randn(D, 4)
    with pytest.raises(TypeError, match="terrazzo.distributed.causal_conv1d_fn: mesh must be a DeviceMesh of one dimension, got NoneType"):
        distributed.causal_conv1d_fn(x, weight, mesh=None)
    with pytest.raises(ValueError, match=r"terrazzo.distributed.causal_conv1d_fn: weight must be \(D, W\) = \(6, 2 or more\), got \(5, 4\)"):
        distributed.causal_conv1d_fn(x, weight[:5], mesh=mesh)
    with pytest.raises(ValueError, match="terrazzo.distributed.causal_conv1d_fn: activation must be"):
        distributed.causal_conv1d_fn(x, weight, activation="gelu", mesh=mesh)
    args = [torch.randn(1, 9, H, P), torch.rand(1, 9, H), -torch.rand(H), torch.randn(1, 9, 3, N), torch.randn(1, 9, 3, N), 8]
    with pytest.raises(ValueError, match="terrazzo.distributed.mamba_chunk_scan_combined: the groups of B must divide the 4 heads of x, got 3"):
        distributed.mamba_chunk_scan_combined(*args, mesh=mesh)
    assert distributed.traffic() == {}


CHECKS = ["conv", "conv_of_short_stretches", "conv_dtypes", "scan", "scan_of_short_stretches", "scan_dtypes", "scan_with_huge_steps", "relay", "relay_of_short_stretches",
          "relay_dtypes", "relay_for_inference", "blocks_follow_each_other", "threads_make_blocks_larger", "a_lost_state_shows",
          "bytes_do_not_depend_on_the_length", "bad_input"]  # fmt: skip
