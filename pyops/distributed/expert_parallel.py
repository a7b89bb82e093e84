"""Expert parallelism: every rank holds E / ranks experts of a layer, and tokens travel to their experts and back.

On each rank: its T tokens' pairs (token, choice) are sorted by expert (moe_permute), which sorts them by rank too; rows travel by
all_to_all_single; the experts here run on the rows that came, as the layer would with these experts alone; the results travel back, and
moe_unpermute weighs and sums them where the token lives. With `chunks` > 1 the next chunk's rows travel while this one's are computed.
"""
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from .. import adapters, checks, packing
from ..moe import moe_permute, moe_unpermute
from ..patching import _is_experts, _plain
from . import comm

FN = "distributed.expert_parallel"


def expert_parallel(module_or_model, mesh, *, chunks=1):
    """Shards the experts of a layer or a model over the ranks of a mesh, in place. Every rank calls it, and then the model, together.

    Args:
        module_or_model: with experts of `terrazzo.models.Dbrx`, of transformers' DBRX, or behind transformers' ExpertsInterface (Mixtral, Qwen, OLMoE,
            DeepSeek, gpt-oss, ...), the same full model on every rank. Their parameters become DTensors, Shard(0) over the mesh; all else stays.
        mesh: a DeviceMesh of one dimension whose size divides the number of experts.
        chunks: the tokens of a call are cut into so many parts, of which one travels while the one before is computed.

    Returns:
        module_or_model. Each rank passes tokens of its own, any number of them, none included; routing and outputs are those of one rank that holds
        every expert. An index >= E contributes nothing. Differentiable in tokens, weights and routing weights. A gradient of an expert is the sum over
        all ranks' losses: see `reduce_gradients`.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or models differ between ranks; before tokens or weights travel, on every rank.
        RuntimeError, in a call: another rank failed.
    """
    group, place, size = comm.check_mesh(FN, mesh)
    comm.agree(FN, group, module_or_model, lambda: _check(module_or_model, size, chunks), chunks=chunks)
    for module in _layers(module_or_model).values():
        _shard(module, mesh, group, place, size, chunks)
    return module_or_model


def reduce_gradients(model, mesh):
    """Makes the gradients those of the mean of the ranks' losses, where each rank has called backward on its own tokens' loss.

    Gradients of parameters sharded over `mesh` are divided by its size; those of all others, spread by `tensor_parallel` over another dimension or not,
    are averaged over its ranks. For a model that no other wrapper (FSDP2, DDP) cares for. Frozen parameters are left out; a gradient that is None counts
    as zero.
    """
    fn = "distributed.reduce_gradients"
    group, _, size = comm.check_mesh(fn, mesh)
    ranks = dist.get_process_group_ranks(group)
    if getattr(model, "_ranks_of_plans", {}).get("distributed.tensor_parallel") == ranks:
        checks.fail(fn, "mesh must be another than that of tensor_parallel, over whose ranks gradients are one rank's already")
    for name, parameter in model.named_parameters():
        others = [set(other) & set(ranks) for other in _ranks_of(parameter) if other != ranks]
        if any(len(shared) > 1 for shared in others):
            checks.fail(fn, f"{name} must be sharded over this mesh, another dimension of it, or not at all, got {parameter.device_mesh}; leave it to the wrapper that sharded it")
    open_works = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.div_(size)
        if not _sharded_over(parameter, ranks):
            grad = parameter.grad.to_local() if isinstance(parameter, DTensor) else parameter.grad
            open_works.append(dist.all_reduce(grad, group=group, async_op=True))
    with comm.explained("summing gradients", group):
        for work in open_works:
            work.wait()


def _ranks_of(parameter):
    """The ranks of each dimension of a DTensor's mesh."""
    mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
    return [dist.get_process_group_ranks(mesh.get_group(i)) for i in range(mesh.ndim)] if mesh is not None else []


def _sharded_over(parameter, ranks):
    """Whether these ranks hold different parts of a parameter."""
    return any(other == ranks and parameter.placements[i].is_shard() for i, other in enumerate(_ranks_of(parameter)))


# ---- which parameters, and whether they divide -------------------------------------------------------------------


def _weights(module):
    """[(owner, name)] of the parameters whose first axis runs over experts; None for a module that isn't a layer of experts."""
    if hasattr(module, "_expert_parallel"):
        return module._expert_parallel.weights
    if _is_dbrx(module):
        return [(module.mlp, name) for name in ("w1", "v1", "w2")]
    if _is_experts(_plain(type(module))):
        names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
        return [(module, name) for name in names + [name + "_bias" for name in names if module.has_bias]]
    return None


def _is_dbrx(module):
    """Whether these are experts of terrazzo.models.Dbrx or of transformers' DBRX: (E * F, D) weights in a module `mlp`."""
    mlp = getattr(module, "mlp", None)
    return isinstance(mlp, nn.Module) and hasattr(module, "num_experts") and {"w1", "v1", "w2"} <= set(mlp._parameters)


def _experts_of(module):
    return module.num_experts if _is_dbrx(module) else module.down_proj.shape[0]


def _layers(model):
    """{path: module} of the layers of experts."""
    return {path or type(module).__name__: module for path, module in model.named_modules() if _weights(module) is not None}


def _check(model, size, chunks):
    if not isinstance(model, nn.Module):
        checks.fail(FN, f"module_or_model must be a torch.nn.Module, got {type(model).__name__}", TypeError)
    checks.check_count(FN, "chunks", chunks, 1)
    layers = _layers(model)
    if not layers:
        checks.fail(FN, f"{type(model).__name__} has no experts that can be sharded: terrazzo.models.Dbrx, transformers' DBRX, or experts behind "
                        "transformers' ExpertsInterface")
    for path, module in layers.items():
        _check_layer(path, module, size)


def _check_layer(path, module, size):
    if hasattr(module, "_expert_parallel"):
        checks.fail(FN, f"the experts of {path} must not be sharded yet, they are; load the model anew")
    if packing._ATTRIBUTE in module.__dict__:
        checks.fail(FN, f"the experts of {path} must not be packed, they are; shard them first")
    for owner, name in _weights(module):
        if not adapters.plain_tensors(owner._parameters[name]):
            checks.fail(FN, f"the weights of {path} must be plain tensors, got a {type(owner._parameters[name]).__name__} {name}; shard experts before anything else")
    E = _experts_of(module)
    if E % size:
        checks.fail(FN, f"the {size} ranks of mesh must divide the {E} experts of {path}; take a mesh of fewer ranks, or a sub-mesh")


# ---- the sharded layer -------------------------------------------------------------------------------------------


class _Layer:
    """What a sharded layer knows: its ranks, its experts, and how it was before."""

    def __init__(self, group, place, size, chunks, experts, weights, cls, forward):
        self.group, self.place, self.size, self.chunks = group, place, size, chunks
        self.experts, self.here, self.weights, self.cls, self.forward = experts, experts // size, weights, cls, forward


def _shard(module, mesh, group, place, size, chunks):
    cls, weights, experts = type(module), _weights(module), _experts_of(module)
    for owner, name in weights:
        whole = owner._parameters[name]
        rows = whole.shape[0] // size
        mine = whole.detach()[place * rows : (place + 1) * rows].clone()
        owner._parameters[name] = nn.Parameter(DTensor.from_local(mine, mesh, [Shard(0)], run_check=False), requires_grad=whole.requires_grad)
    if not _is_dbrx(module):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        forward = adapters.experts(ALL_EXPERTS_FUNCTIONS["grouped_mm"], None)
    else:
        forward = adapters.dbrx_experts(cls.forward, None) if hasattr(module.mlp, "activation_fn") else cls.forward
    layer = _Layer(group, place, size, chunks, experts, weights, cls, forward)
    object.__setattr__(module, "_expert_parallel", layer)
    module.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "forward": _forward})


def _view(module, layer):
    """(the layer as it would be with this rank's experts alone, their weights)."""
    view = object.__new__(layer.cls)
    view.__dict__.update(module.__dict__)
    view.__dict__["_parameters"] = own = dict(module._parameters)
    view.__dict__["num_experts"] = layer.here
    if _is_dbrx(module):
        mlp = object.__new__(type(module.mlp))
        mlp.__dict__.update(module.mlp.__dict__)
        mlp.__dict__["_parameters"] = own = dict(module.mlp._parameters)
        view.__dict__["_modules"] = module._modules | {"mlp": mlp}
    for _, name in layer.weights:
        own[name] = own[name].to_local()
    return view, [own[name] for _, name in layer.weights]


@torch.compiler.disable
def _forward(self, hidden_states, top_k_index, top_k_weights):
    layer = self._expert_parallel
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    checks.check_tensor(FN, "top_k_index", top_k_index, 2, "(T, A)", x, dtypes=(torch.int32, torch.int64))
    checks.check_tensor(FN, "top_k_weights", top_k_weights, 2, "(T, A)", x)
    checks.check_shape(FN, "top_k_index", top_k_index, (x.shape[0], None), "(T, A)")
    checks.check_shape(FN, "top_k_weights", top_k_weights, tuple(top_k_index.shape), "like top_k_index")
    T, A = top_k_index.shape
    ends = [T * i // layer.chunks for i in range(layer.chunks + 1)]
    parts = [slice(begin, end) for begin, end in zip(ends, ends[1:])]
    sorted_pairs = [moe_permute(top_k_index[part], layer.experts) for part in parts]
    counts = torch.stack([torch.diff(offs, prepend=offs.new_zeros(1)) for _, _, offs in sorted_pairs])
    arriving, sizes = _exchange_counts(layer, counts)
    view, weights = _view(self, layer)

    def dispatch(i):
        order, exchange = sorted_pairs[i][0], comm.Exchange(layer.group, layer.place, *sizes[i], "expert dispatch")
        rows = x[parts[i]][order[: sum(sizes[i][0])] // A]
        return exchange, exchange.start(rows)

    returning, ahead = [], dispatch(0)
    for i in range(layer.chunks):
        (exchange, buffer), ahead = ahead, dispatch(i + 1) if i + 1 < layer.chunks else None
        rows = _run(layer, view, weights, exchange.finish(buffer), arriving[:, i])
        exchange = comm.Exchange(layer.group, layer.place, *reversed(sizes[i]), "expert combine")
        returning.append((exchange, exchange.start(rows)))
    y = [_combine(exchange.finish(buffer), sorted_pairs[i][1], top_k_weights[parts[i]]) for i, (exchange, buffer) in enumerate(returning)]
    return torch.cat(y).view_as(hidden_states) if len(y) > 1 else y[0].view_as(hidden_states)


def _exchange_counts(layer, counts):
    """counts (chunks, E) -> the rows that come (source rank, chunk, expert here), and for each chunk ([rows to each rank], [rows from each rank])."""
    leaving = counts.view(layer.chunks, layer.size, layer.here).transpose(0, 1)
    exchange = comm.Exchange(layer.group, layer.place, [1] * layer.size, [1] * layer.size, "expert counts")
    exchange.begin(leaving)
    arriving = exchange.end()
    sizes = torch.stack([leaving.sum(2), arriving.sum(2)]).permute(2, 0, 1).tolist()  # the one wait for the device: the splits are host numbers
    return arriving, sizes


def _run(layer, view, weights, rows, counts):
    """The experts here on the rows (M, D) that came, sorted by (source rank, expert): counts (ranks, experts here)."""
    M = rows.shape[0]
    if M == 0:  # nothing to compute, but every rank has to take part in the backward pass
        return rows + sum(w.flatten()[:0].sum() for w in weights).to(rows.dtype)
    experts = torch.arange(layer.here, dtype=torch.int32, device=rows.device).repeat(layer.size)
    experts = experts.repeat_interleave(counts.flatten(), output_size=M)[:, None]
    ones = rows.new_ones(M, 1)
    if _is_dbrx(view):
        return layer.forward(view, rows[None] if hasattr(view.mlp, "activation_fn") else rows, experts, ones).view_as(rows)
    return layer.forward(view, rows, experts, ones)


def _combine(rows, inverse, weights):
    missing = weights.numel() - rows.shape[0]  # pairs of nobody: they stand last
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
    return moe_unpermute(rows, inverse, weights)
