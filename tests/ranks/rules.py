"""Checks of the ops on DTensors: every layout that a rule accepts, forward and backward, and whole functions with any argument split in any way."""
import pytest
import terrazzo
import torch
from terrazzo import cases
from terrazzo.distributed import sharding_rules
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode


def same(found, expected, where):
    """Equal but for the rounding of partial sums."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, f"{where}: {found.shape} {found.dtype}, not {expected.shape} {expected.dtype}"
    if not expected.is_floating_point():
        assert torch.equal(found, expected), where
    elif expected.numel():
        limit = (2e-2 if expected.dtype == torch.bfloat16 else 1e-5) * max(1.0, expected.abs().max().item())
        error = (found.double() - expected.double()).nan_to_num(0.0, 0.0, 0.0).abs().max().item()  # what isn't finite is compared below
        assert error <= limit and torch.equal(found.isfinite(), expected.isfinite()), f"{where}: {error} over {limit}"


class Recorder(TorchDispatchMode):
    """(op, contiguous copies of its arguments) of every call of an op of terrazzo."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace != "terrazzo":
            return op(*args, **(kwargs or {}))
        self.calls.append((op, copies(args)))
        return op(*args)


def copies(args):
    return [arg.clone(memory_format=torch.contiguous_format) if isinstance(arg, torch.Tensor) else arg for arg in args]


def recorded(run):
    recorder = Recorder()
    with recorder:
        run()
    return recorder.calls


def not_in_the_cases():
    """Ops that no case calls: packed weights, and patches of a text that comes in blocks."""
    r = cases.Random(0)

    def normal(*shape):
        return r.normal(*shape, dtype=torch.float32)

    offs, indices = torch.tensor([3, 3, 8], dtype=torch.int32), torch.randint(0, 3, (8, 2), generator=r.generator, dtype=torch.int32)
    yield "packed grouped_mm", lambda: terrazzo.grouped_mm(normal(8, 12), terrazzo.pack_weight(normal(3, 12, 20)), offs)
    yield "packed experts", lambda: terrazzo.fused_experts(normal(8, 12), terrazzo.pack_expert_weights(normal(3, 40, 12), normal(3, 12, 20)), None, normal(8, 2).abs(), indices)
    yield "PatcherState", lambda: terrazzo.PatcherState(4, 0.5).update(normal(4, 9).abs())


class Anywhere:
    """Placements that hold every placement: of arguments updated in place, all layouts are listed."""

    def __contains__(self, placement):
        return True


class Spec:
    def __init__(self, tensor, mesh):
        self.shape, self.stride, self.mesh, self.placements = tensor.shape, tensor.stride(), mesh, Anywhere()


def layouts(op, args, mesh):
    """What the op's rule accepts for these arguments, where they are large enough to be split."""
    specs = [Spec(arg, mesh) if isinstance(arg, torch.Tensor) else arg for arg in args]
    for outputs, inputs in sharding_rules._layouts(op, *sharding_rules.RULES[op._schema.name.partition("::")[2]], specs):
        splits = [arg.shape[placement.dim] for arg, placement in zip(args, inputs) if isinstance(placement, Shard)]
        if all(size >= mesh.size() for size in splits):
            yield outputs, inputs


def same_in_every_layout(mesh, case, run, seen):
    """Each op that run() calls, on DTensors in each accepted layout: nothing travels, and the results are the plain ones."""
    for op, before in recorded(run):
        name = op._schema.name.partition("::")[2]
        if name == "fused_experts_bwd":
            continue  # what its forward has kept is of no order that could be cut or compared: `experts_split` goes through both
        if name == "byte_hash_embedding_bwd" and before[10]:
            continue  # sparse gradients: DTensors have none
        after = copies(before)
        results = op(*after)
        results = results if isinstance(results, tuple) else (results,)
        for outputs, inputs in layouts(op, before, mesh):
            args = [arg if placement is None else distribute_tensor(arg, mesh, [placement], src_data_rank=None) for arg, placement in zip(copies(before), inputs)]
            with CommDebugMode() as travelled:
                found = op(*args)
            found = found if isinstance(found, tuple) else (found,)
            where = f"{case} {name} {inputs}"
            assert travelled.get_total_counts() == 0, where
            assert [tuple(out.placements) for out in found] == [(out,) for out in outputs], where
            for out, expected in zip(found[:1] if name == "fused_experts_fwd" else found, results):
                same(out.full_tensor(), expected, where)
            for arg, expected in zip(args, after):
                if isinstance(arg, DTensor):
                    same(arg.full_tensor(), expected, f"{where}, updated")
            seen.setdefault(name, set()).update(str(placement) for placement in inputs if isinstance(placement, Shard))


def ops_in_every_layout(mesh):
    seen = {}
    for case in cases.CASES:
        same_in_every_layout(mesh, case, lambda case=case: cases.run(case, case.make(torch.float32), "cpu", gradients=bool(case.grads)), seen)
    for name, run in not_in_the_cases():
        same_in_every_layout(mesh, name, run, seen)
    served = set(sharding_rules.RULES) - {"fused_experts_bwd"}
    whole = {"moe_permute", "grouped_gemm_packed"}  # a sort of all rows; panels of the kernels' own
    assert set(seen) == served and all(seen[name] for name in served - whole), (set(seen) ^ served, [name for name in seen if not seen[name]])


def functions_of_any_split(mesh):
    """A public function gives the plain results and gradients when any one argument is split along any dimension; DTensor moves what it has to."""
    known = set()
    for case in cases.CASES:
        if case.updated or case.op in known:
            continue  # states stay where they are: `states_that_are_in_the_way`
        known.add(case.op)
        kwargs = case.make(torch.float32)
        expected = cases.run(case, kwargs, "cpu", gradients=bool(case.grads))
        for name, value in kwargs.items():
            for dim in range(value.dim() if isinstance(value, torch.Tensor) else 0):
                if value.shape[dim] % mesh.size() == 0 and value.shape[dim]:
                    found = cases.run(case, kwargs, "cpu", bool(case.grads), function=on_dtensors(case.op, mesh, {name: Shard(dim)}))
                    for key, value_found in found.items():
                        same(value_found, expected[key], f"{case} {name} split along {dim}, {key}")


def on_dtensors(op, mesh, splits):
    def function(*, backend, **kwargs):
        def spread(name, value):
            value = DTensor.from_local(value, mesh, [Replicate()], run_check=False)
            return value.redistribute(placements=[splits[name]]) if name in splits else value

        kwargs = {name: spread(name, value) if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
        results = getattr(terrazzo, op)(**kwargs, backend=backend)
        whole = tuple(out.full_tensor() if isinstance(out, DTensor) else out for out in (results if isinstance(results, tuple) else (results,)))
        return whole if isinstance(results, tuple) else whole[0]

    return function


def experts_split(mesh):
    """fused_experts forward and backward with tokens split, and with every expert's channels split: nothing travels but what is asked for whole."""
    tokens = {name: Shard(0) for name in ("x", "topk_weights", "topk_indices")}
    channels = {"hf": None, "up": {"w_gate_up": Shard(1), "w_up": Shard(1), "w_down": Shard(2)}}
    r = cases.Random(0)
    T, D, F, E, A = 4 * mesh.size(), 12, 4 * mesh.size(), 3, 2
    for layout, split in channels.items():
        kwargs = dict(x=r.normal(T, D, dtype=torch.float32), w_gate_up=r.normal(E, 2 * F if layout == "hf" else F, D, dtype=torch.float32),
                      w_down=r.normal(E, D, F, dtype=torch.float32), topk_weights=r.uniform(T, A, dtype=torch.float32),
                      topk_indices=torch.randint(0, E, (T, A), generator=r.generator, dtype=torch.int32))  # fmt: skip
        if layout == "up":
            kwargs["w_up"] = r.normal(E, F, D, dtype=torch.float32)
        case = cases.Case("fused_experts", layout, None, tuple(name for name in kwargs if name != "topk_indices"))
        expected = cases.run(case, kwargs, "cpu", True)
        for splits in (tokens, split):
            if splits is not None:
                found = cases.run(case, kwargs, "cpu", True, function=on_dtensors("fused_experts", mesh, splits))
                for name, value in found.items():
                    same(value, expected[name], f"{layout} {splits} {name}")


def states_that_are_in_the_way(mesh):
    """A state that is updated in place stays where it is, or the call is refused."""
    x, weight = (distribute_tensor(torch.randn(*shape), mesh, [Replicate()]) for shape in ((4, 8), (8, 4)))
    for dim in (0, 1):
        state = distribute_tensor(torch.randn(4, 8, 4), mesh, [Shard(dim)])
        with torch.no_grad():
            y = terrazzo.causal_conv1d_update(x, state, weight, backend="cpu")
        assert y.placements == state.placements == (Shard(dim),)
    state = distribute_tensor(torch.randn(4, 8, 4), mesh, [Shard(2)])
    with torch.no_grad(), pytest.raises(Exception, match="terrazzo.causal_conv1d_update: conv_state is updated in place, which its placements .* don't allow"):
        terrazzo.causal_conv1d_update(x, state, weight, backend="cpu")


def rules_on_two_dimensions(mesh):
    """Batch on one mesh dimension, heads or channels on the other."""
    from ranks.tensors import two_dimensions

    grid = two_dimensions("data", "tensor")
    x, weight, bias = torch.randn(4, 8, 9), torch.randn(8, 4), torch.randn(8)
    y = terrazzo.causal_conv1d_fn(*(distribute_tensor(t, grid, placed) for t, placed in ((x, [Shard(0), Shard(1)]), (weight, [Replicate(), Shard(0)]),
                                                                                     (bias, [Replicate(), Shard(0)]))), activation="silu")
    assert y.placements == (Shard(0), Shard(1))
    torch.testing.assert_close(y.full_tensor(), terrazzo.causal_conv1d_fn(x, weight, bias, activation="silu"), rtol=0, atol=0)
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    y = terrazzo.local_attention(*(distribute_tensor(t, grid, [Shard(0), Shard(2)]) for t in (q, k, v)), 4)
    torch.testing.assert_close(y.full_tensor(), terrazzo.local_attention(q, k, v, 4), rtol=0, atol=0)


RULES = ["ops_in_every_layout", "functions_of_any_split", "experts_split", "states_that_are_in_the_way"]
