"""Checks of context parallelism, run on every rank: each computes the whole sequence alone and compares its stretch, gradients included."""
import pytest
import terrazzo
import torch
import torch.distributed as dist
from ranks.spawn import close
from terrazzo import distributed

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


def scan_exact(mesh, lengths, kind=None, dtype=torch.float32, steep=1.0):
    lengths = lengths[: mesh.size()]
    L, borders = sum(lengths), torch.tensor(lengths).cumsum(0)[:-1].tolist()
    draw = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(*shape, generator=draw).to(dtype)

    sharded = {"x": random(2, L, H, P), "dt": random(2, L, H), "B": random(2, L, G, N), "C": random(2, L, G, N), "z": random(2, L, H, P)}
    shared = {"A": -steep * torch.rand(H, generator=draw), "D": torch.randn(H, generator=draw), "dt_bias": torch.randn(H, generator=draw)}
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


def a_lost_state_shows(mesh):
    """The comparison fails on every rank but the first when ranks scan from zero, and when a convolution has no halo."""
    lengths = LENGTHS[: mesh.size()]
    original = distributed.comm.Line.shift
    distributed.comm.Line.shift = lambda self, tensor, step, received=None: received
    try:
        for check in (conv_exact, scan_exact):
            if mesh.get_local_rank() == 0:
                with pytest.raises(AssertionError, match="^d"):  # its outputs are right: what flows back is missing
                    check(mesh, lengths)
            else:
                with pytest.raises(AssertionError, match="^y"):
                    check(mesh, lengths)
    finally:
        distributed.comm.Line.shift = original


def bytes_do_not_depend_on_the_length(mesh):
    rank, last = mesh.get_local_rank(), mesh.size() - 1
    assert (distributed.volume.halo(2, D, 4, 4), distributed.volume.states(2, H, P, N)) == (4 * 2 * D * 3, 4 * 2 * H * P * N)
    for L in (16, 256):
        x, weight = torch.randn(2, D, L, requires_grad=True), torch.randn(D, 4)
        ids = torch.zeros(2, L, dtype=torch.int32)
        distributed.reset_traffic()
        y = distributed.causal_conv1d_fn(x, weight, mesh=mesh)
        halo = distributed.volume.halo(2, D, 4, 4)
        assert distributed.traffic().get("convolution halo", 0) == halo * (rank < last)
        y.sum().backward()
        assert distributed.traffic()["convolution halo"] == halo * ((rank < last) + (rank > 0))
        args = (torch.randn(2, L, H, P, requires_grad=True), torch.rand(2, L, H), -torch.rand(H), torch.randn(2, L, G, N), torch.randn(2, L, G, N), 8)
        states = distributed.volume.states(2, H, P, N)
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


CHECKS = ["conv", "conv_of_short_stretches", "conv_dtypes", "scan", "scan_of_short_stretches", "scan_dtypes", "scan_with_huge_steps", "a_lost_state_shows",
          "bytes_do_not_depend_on_the_length", "bad_input"]  # fmt: skip
