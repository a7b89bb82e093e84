"""Tensor parallelism: every rank holds some heads of each attention and scan, some channels of each MLP and expert, and some words of the vocabulary.

A region starts where a norm's output is entered (`Enter`: gradients are summed over ranks), runs on this rank's columns (`Column`), and ends with rows
whose partial products are summed (`Row`): two sums of (B, L, D) a layer forward and two backward. Parameters are DTensors; a module sees its rank's part.

Weights of several parts side by side (Wqkv; in_proj with z, x, B, C, dt; a convolution's x, B, C; w1 of all experts) are split part by part. Such a
parameter holds the rows in the order of the ranks; a state dict holds them in the model's order, both when it is made and when it is loaded.
Source: Shoeybi et al. (2019), Megatron-LM.
"""
import math

import terrazzo
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from .. import adapters, checks
from ..packing import _ATTRIBUTE as PACKED
from . import collectives, comm

FN = "distributed.tensor_parallel"
LAYER, NORM, GROUPS, EMBEDDING, HEAD, LOSS = (f"tensor {what}" for what in ("layers", "norms", "groups", "embeddings", "heads", "losses"))


def tensor_parallel(model, mesh):
    """Spreads a model over the ranks of a mesh, in place. Every rank calls it, and then the model, together, with the same inputs.

    Args:
        model: a Bamba, Dbrx, Blt or Blenderbot of `terrazzo.models`, the same on every rank. Its parameters become DTensors over the mesh. A Dbrx may have
            been through `expert_parallel` on another dimension of one mesh before; `fully_shard` comes after, on another dimension too.
        mesh: a DeviceMesh of one dimension. Its size divides the heads of queries, keys and values, those of the scan, the channels of MLPs and
            experts; of the scan's groups it is a divisor or a multiple. Words needn't be as many on every rank.

    Returns:
        model. Its outputs, losses, gradients and generated tokens are those of one rank, on every rank. Logits are DTensors, split along the vocabulary:
        logits.full_tensor() collects them; the loss doesn't need that. Random draws (dropout, layerdrop, sampling) must agree: seed all ranks alike.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or models differ between ranks; on every rank, before anything is changed.
        RuntimeError, in a call: another rank failed.
    """
    group, _, size = comm.check_mesh(FN, mesh)
    comm.agree(FN, group, model, lambda: _check(model, mesh, size))
    return parallelize_module(model, mesh, plan(model))


def _check(model, mesh, size):
    styles = plan(model)
    _check_free(model, mesh)
    comm.check_claims(FN, model, mesh)
    for path, style in styles.items():
        style.check(path, model.get_submodule(path), size)


def plan(model):
    """{path of a module: style} for torch's `parallelize_module`, which `tensor_parallel` checks and applies. The style at "" comes last: it spreads
    what no other has, whole, to every rank, and lets `generate` see all of the vocabulary."""
    from ..models import blenderbot, blt, dbrx, bamba  # fmt: skip

    for cls, make in ((bamba.Bamba, _bamba), (dbrx.Dbrx, _dbrx), (blt.Blt, _blt), (blenderbot.Blenderbot, _blenderbot)):
        if isinstance(model, cls):
            return make(model) | {"": Whole()}
    return checks.fail(FN, f"model must be a Bamba, Dbrx, Blt or Blenderbot of terrazzo.models, got {type(model).__module__}.{type(model).__name__}", TypeError)


def full_tensor(model, name, tensor=None):
    """The whole of a spread parameter in the model's order, or of a DTensor like it: its gradient, an optimiser's moments. Every rank calls it.

    model: after `tensor_parallel`. name: of the parameter. tensor: None for the parameter itself. Returns a plain tensor. (DTensor's own full_tensor()
    gives the rows of Wqkv, in_proj, conv1d and experts' weights in the order of the ranks.)
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if module._parameters.get(leaf) is None:
        checks.fail("distributed.full_tensor", f"name must be that of a parameter of model, got {name!r}")
    tensor = module._parameters[leaf].detach() if tensor is None else tensor
    order = getattr(module, "_rank_orders", {}).get(leaf)
    return order.unshuffled(tensor) if order else tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- plans -------------------------------------------------------------------------------------------------------


def _attention(path, module, out="o_proj"):
    heads = module.head_dim
    kv = Column("heads of keys and values", heads)
    return {f"{path}.q_proj": Column("heads of queries", heads), f"{path}.k_proj": kv, f"{path}.v_proj": kv, f"{path}.{out}": Row()}


def _gated_mlp(path):
    return {f"{path}.gate_proj": Column("channels"), f"{path}.up_proj": Column("channels"), f"{path}.down_proj": Row()}


def _bamba(model):
    styles = {"model.embed_tokens": VocabularyEmbedding()}
    for i, layer in enumerate(model.model.layers):
        path = f"model.layers.{i}"
        styles |= {f"{path}.input_layernorm": Enter(), f"{path}.pre_ff_layernorm": Enter()} | _gated_mlp(f"{path}.feed_forward")
        styles |= _attention(f"{path}.self_attn", layer.self_attn) if layer.kind == "self_attn" else {f"{path}.mamba": Mamba(), f"{path}.mamba.out_proj": Row()}
    return styles | {"lm_head": VocabularyHead()}


def _dbrx(model):
    styles = {"transformer.wte": VocabularyEmbedding()}
    for i in range(len(model.transformer.blocks)):
        path = f"transformer.blocks.{i}"
        part = f"{path}.norm_attn_norm"
        styles |= {f"{part}.norm_1": Enter(), f"{part}.attn": FusedHeads(), f"{part}.attn.out_proj": Row(), f"{path}.ffn.experts": Experts()}
    return styles | {"lm_head": VocabularyHead()}


def _blenderbot(model):
    styles = {"model.shared": VocabularyEmbedding(), "model.encoder.layer_norm": Enter()}  # what every decoder layer asks is entered once
    for name, stack in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        for i, layer in enumerate(stack.layers):
            path = f"model.{name}.layers.{i}"
            for attention in ("self_attn", "encoder_attn") if hasattr(layer, "encoder_attn") else ("self_attn",):
                styles |= {f"{path}.{attention}_layer_norm": Enter()} | _attention(f"{path}.{attention}", layer.self_attn, "out_proj")
            styles |= {f"{path}.final_layer_norm": Enter(), f"{path}.fc1": Column("channels"), f"{path}.fc2": Row()}
    return styles | {"lm_head": VocabularyHead()}


def _blt(model):
    """The patcher, which has no gradient, stays whole, and a head that is the bytes' embedding too. The table of hashes is split along its width."""
    styles = {"model": HashEmbedding()} | ({} if model.tied() else {"lm_head": VocabularyHead()})
    for name in ("local_encoder", "global_transformer", "local_decoder"):
        stack = getattr(model.model, name)
        for i, layer in enumerate(stack.layers):
            path = f"model.{name}.layers.{i}"
            styles |= {f"{path}.input_layernorm": Enter(), f"{path}.post_attention_layernorm": Enter()}
            styles |= _attention(f"{path}.self_attn", layer.self_attn) | _gated_mlp(f"{path}.mlp")
        for i, cross in enumerate(getattr(stack, "cross_attn_layers", ())):
            path = f"model.{name}.cross_attn_layers.{i}"
            styles |= {f"{path}.q_norm": Enter(), f"{path}.k_norm": Enter()} | _attention(path, cross)
    return styles


# ---- what a rank holds -------------------------------------------------------------------------------------------


def _place(module, name, mesh, dim=None, parts=None):
    """Makes a parameter (or buffer) a DTensor: whole on every rank, or split along `dim`, or along dimension 0 part by part (parts: their sizes)."""
    table = module._parameters if name in module._parameters else module._buffers
    whole = table[name]
    if whole is None:
        return
    known = getattr(whole, "_tensor_parallel", None)  # of a tied parameter, which another module has spread already
    if known is None:
        ranks = collectives.Ranks(mesh)
        dim = 0 if parts is not None else dim
        local = _local(whole.detach())
        if dim is not None:
            shares = [(piece, *ranks.own(piece.shape[dim])) for piece in local.split(parts or [local.shape[dim]], dim)]
            local = torch.cat([piece.narrow(dim, begin, end - begin) for piece, begin, end in shares], dim)
        known = _spread(whole, local, mesh, dim)
        if table is module._parameters:
            known = nn.Parameter(known, requires_grad=whole.requires_grad)
            whole._tensor_parallel = known
    table[name] = known
    if table is module._parameters:
        _specialise(module, {name: _part(name, known.device_mesh)})
    if parts is not None:
        order = _Order(name, mesh.size(), parts)
        module._rank_orders = getattr(module, "_rank_orders", {}) | {name: order}
        module.register_state_dict_post_hook(lambda *args: order.on_saving(*args))  # torch marks the function, which a method doesn't let it
        module.register_load_state_dict_pre_hook(order.on_loading)


def _part(name, mesh):
    """What a module sees of its parameter: this rank's part. Not where FSDP2 keeps a piece of that, on a mesh of more dimensions, between calls."""

    def get(self):
        parameter = self._parameters[name]
        return parameter.to_local() if isinstance(parameter, DTensor) and parameter.device_mesh == mesh else parameter

    return property(get)


def _spread(whole, local, mesh, dim):
    placement = Replicate() if dim is None else Shard(dim)
    if not isinstance(whole, DTensor):
        return DTensor.from_local(local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride())
    both = DeviceMesh._concatenate([whole.device_mesh, mesh])  # experts that live on another dimension
    return DTensor.from_local(local, both, [*whole.placements, placement], run_check=False)


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _specialise(module, members):
    """Gives this one module a class of its own with further members."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__} | members)
    return cls


class _Order:
    """Of a parameter whose rows lie in the order of the ranks: each rank's pieces of all parts, where the model has part after part."""

    def __init__(self, name, size, parts):
        self.name, self.size, self.parts = name, size, parts

    def _pieces(self, number):
        """[(begin, end)] of the model's rows, `number` in all, piece after piece as the parameter has them."""
        starts, whole = [sum(self.parts[:i]) for i in range(len(self.parts))], sum(self.parts)
        return [(begin, begin + part // self.size)
                for other in range(0, number, whole)  # ranks of expert parallelism, each with rows like these
                for rank in range(self.size) for start, part in zip(starts, self.parts) for begin in (other + start + part // self.size * rank,)]  # fmt: skip

    def _rows(self, number):
        """The row of the model that each row of the parameter is."""
        return torch.cat([torch.arange(begin, end) for begin, end in self._pieces(number)])

    def on_saving(self, module, state_dict, prefix, local_metadata):
        found, regroups = state_dict[prefix + self.name], self._regroups(state_dict[prefix + self.name])
        if found.is_meta:  # has a shape alone, the same in any order; and tells what to read
            state_dict[prefix + self.name] = shape = found if regroups else torch.empty(found.shape, dtype=found.dtype, device="meta")
            shape.in_ranks = found, self._pieces(len(found))
        else:
            state_dict[prefix + self.name] = self._regrouped(found) if regroups else self.unshuffled(found)

    def unshuffled(self, found):
        whole = found.full_tensor()
        return torch.empty_like(whole).index_copy_(0, self._rows(len(whole)).to(whole.device), whole)

    def _regroups(self, found):
        """Parts of one size that the ranks can share out whole (experts): then nobody needs all of them."""
        return found.device_mesh.ndim == 1 and len(set(self.parts)) == 1 and len(self.parts) % self.size == 0 and len(self.parts) > 1

    def _regrouped(self, found):
        """A piece of every part on each rank -> some whole parts on each: rows in the model's order."""
        number = len(self.parts)
        pieces = found.to_local().unflatten(0, (number, -1))
        shape = (number, self.parts[0], *found.shape[1:])
        stride = (self.parts[0] * found.stride(0), *found.stride())
        parts = DTensor.from_local(pieces, found.device_mesh, [Shard(1)], run_check=False, shape=torch.Size(shape), stride=stride).redistribute(placements=[Shard(0)])
        return DTensor.from_local(parts.to_local().flatten(0, 1), found.device_mesh, [Shard(0)], run_check=False)

    def on_loading(self, module, state_dict, prefix, *rest):
        key = prefix + self.name
        if key not in state_dict:
            return
        whole, mine = state_dict[key], module._parameters[self.name]
        if getattr(whole, "in_rank_order", False):
            return
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        if whole.shape != mine.shape:
            return  # load_state_dict says so
        whole = whole[self._rows(len(whole)).to(whole.device)]
        if isinstance(mine, DTensor):
            device = whole.device if mine.is_meta else mine.device
            whole = distribute_tensor(whole.to(device), mine.device_mesh, mine.placements, src_data_rank=None)
        state_dict[key] = whole


# ---- styles ------------------------------------------------------------------------------------------------------


class Style(ParallelStyle):
    def check(self, path, module, size):
        """Raises where `size` ranks can't share this module."""


def _check_divides(path, what, number, size):
    if number % size:
        checks.fail(FN, f"the {size} ranks of mesh must divide the {number} {what} of {path}; take a mesh of fewer ranks, or a sub-mesh")


def _check_words(path, number, size):
    if (size - 1) * -(-number // size) >= number:
        checks.fail(FN, f"each of the {size} ranks of mesh must have some of the {number} words of the vocabulary of {path}; take a mesh of fewer ranks, or "
                        "a sub-mesh")


class Enter(Style):
    """The output of this module goes into a region whose ranks differ: its gradient is summed."""

    def _apply(self, module, mesh):
        ranks = collectives.Ranks(mesh)
        module.register_forward_hook(lambda module, args, output: collectives.enter(output, ranks, LAYER))
        return module


class Column(Style):
    """A linear layer of whose outputs, units of so many rows, each rank has some."""

    def __init__(self, what, unit=1):
        self.what, self.unit = what, unit

    def check(self, path, module, size):
        _check_divides(path, self.what, module.weight.shape[0] // self.unit, size)

    def _apply(self, module, mesh):
        for name in ("weight", "bias"):
            _place(module, name, mesh, 0)
        return module


class Row(Style):
    """A linear layer of whose inputs each rank has some; the partial outputs are summed, then biased."""

    def check(self, path, module, size):
        _check_divides(path, "inputs", module.weight.shape[1], size)

    def _apply(self, module, mesh):
        from ..models.layers import linear

        ranks = collectives.Ranks(mesh)
        _place(module, "weight", mesh, 1)
        _place(module, "bias", mesh)

        def forward(self, x):
            y = collectives.leave(linear(x, self.weight), ranks, LAYER)
            return y if self.bias is None else y + self.bias

        _specialise(module, {"forward": forward})
        return module


class FusedHeads(Style):
    """Dbrx's attention: queries, keys and values in one weight, each split by heads."""

    def check(self, path, module, size):
        for what, width in zip(("heads of queries", "heads of keys and values"), module.widths):
            _check_divides(path, what, width // module.head_dim, size)

    def _apply(self, module, mesh):
        _place(module.Wqkv, "weight", mesh, parts=module.widths)
        module.widths = [width // mesh.size() for width in module.widths]
        return module


class Experts(Style):
    """Every expert's F channels split; routing is the same on all ranks."""

    def check(self, path, module, size):
        rows = _local(module.mlp._parameters["w1"]).shape[0]
        _check_divides(path, "channels of an expert", rows // _experts_here(module), size)

    def _apply(self, module, mesh):
        ranks = collectives.Ranks(mesh)
        number = _experts_here(module)
        for name in ("w1", "v1", "w2"):
            _place(module.mlp, name, mesh, parts=[_local(module.mlp._parameters[name]).shape[0] // number] * number)
        cls = type(module)

        def forward(self, tokens, indices, weights):
            tokens, weights = collectives.enter(tokens, ranks, LAYER), collectives.enter(weights, ranks, LAYER)
            return collectives.leave(cls.forward(self, tokens, indices, weights), ranks, LAYER)

        _specialise(module, {"forward": forward})
        return module


def _experts_here(module):
    return module._expert_parallel.here if hasattr(module, "_expert_parallel") else module.num_experts


class Mamba(Style):
    """Bamba's scan: heads with their channels of gate, input, convolution and norm. Groups are split, or where there are fewer groups than ranks, each
    rank computes some of a group's B and C and they are collected; the norm's mean of squares is then summed over ranks."""

    def check(self, path, module, size):
        c = module.config
        _check_divides(path, "heads of the scan", c.mamba_n_heads, size)
        if c.mamba_n_groups % size and size % c.mamba_n_groups:
            checks.fail(FN, f"the {size} ranks of mesh must divide the {c.mamba_n_groups} groups of {path}, or be a multiple of them; take another mesh")
        _check_divides(path, "channels of B", c.mamba_n_groups * c.mamba_d_state, size)

    def _apply(self, module, mesh):
        ranks, config = collectives.Ranks(mesh), module.config
        inner, *groups = module.parts
        for name in ("weight", "bias"):
            _place(module.in_proj, name, mesh, parts=[inner, *module.parts, config.mamba_n_heads])
            _place(module.conv1d, name, mesh, parts=module.parts)
        for owner, name in ((module, "dt_bias"), (module, "A_log"), (module, "D"), (module.norm, "weight")):
            _place(owner, name, mesh, 0)
        module.parts = [part // mesh.size() for part in module.parts]
        module.channels = sum(module.parts)
        if config.mamba_n_groups < mesh.size():
            _specialise(module, _few_groups(ranks, config))
        return module


def _few_groups(ranks, config):
    """Members of a scan whose groups span ranks."""
    G, N, width = config.mamba_n_groups, config.mamba_d_state, config.mamba_n_heads * config.mamba_d_head // config.mamba_n_groups
    mine = ranks.place * G // ranks.size

    def groups(self, B, C):
        both = collectives.collect(torch.stack([B, C]), ranks, GROUPS, differ=True)
        return both[..., mine * N : (mine + 1) * N].unsqueeze(-2).unbind(0)

    def norm(self, y, gate):
        acc = torch.promote_types(y.dtype, torch.float32)
        y_gated = y.to(acc) * F.silu(gate.to(acc))
        squares = y_gated.square().sum(-1, keepdim=True)
        sums = collectives.sum_of_all(F.pad(squares, (mine, G - 1 - mine)), ranks, NORM)[..., mine : mine + 1]
        return (y_gated * (sums / width + self.norm.eps).rsqrt() * self.norm.weight.to(acc)).to(y.dtype)

    return {"_groups": groups, "_norm": norm}


class VocabularyEmbedding(Style):
    """Each rank has the rows of some words; the others' are zero, and all are summed."""

    def check(self, path, module, size):
        _check_words(path, module.weight.shape[0], size)

    def _apply(self, module, mesh):
        ranks = collectives.Ranks(mesh)
        begin, end = ranks.own(module.num_embeddings)
        padding = None if module.padding_idx is None or not begin <= module.padding_idx < end else module.padding_idx - begin
        _place(module, "weight", mesh, 0)

        def forward(self, ids):
            here = ids - begin
            others = (here < 0) | (here >= end - begin)
            y = F.embedding(here.masked_fill(others, 0), self.weight, padding).masked_fill(others[..., None], 0)
            return collectives.leave(y, ranks, EMBEDDING)

        _specialise(module, {"forward": forward})
        return module


class VocabularyHead(Style):
    """A linear layer to the logits of some words on each rank: a DTensor."""

    def check(self, path, module, size):
        _check_words(path, module.weight.shape[0], size)

    def _apply(self, module, mesh):
        from ..models.layers import linear

        ranks = collectives.Ranks(mesh)
        _place(module, "weight", mesh, 0)

        def forward(self, h):
            logits = linear(collectives.enter(h, ranks, HEAD), self.weight)
            whole = torch.empty(*logits.shape[:-1], self.out_features, device="meta")
            return DTensor.from_local(logits, mesh, [Shard(logits.dim() - 1)], run_check=False, shape=whole.shape, stride=whole.stride())

        _specialise(module, {"forward": forward})
        return module


class HashEmbedding(Style):
    """Blt's embedding of bytes and their hashes: each rank has some channels, which are collected."""

    def check(self, path, module, size):
        _check_divides(path, "channels of the embedding", module.encoder_hash_tok_embedding.weight.shape[1], size)

    def _apply(self, module, mesh):
        ranks, config = collectives.Ranks(mesh), module.config
        _place(module.encoder_hash_tok_embedding, "weight", mesh, 1)

        def embed(self, ids):
            byte = collectives.enter(self.local_encoder.embed_tokens.weight, ranks, EMBEDDING).chunk(ranks.size, 1)[ranks.place]
            some = terrazzo.byte_hash_embedding(ids, self.encoder_hash_tok_embedding.weight, byte, config.encoder_hash_byte_group_size,
                                                config.encoder_hash_byte_group_nb_functions, config.encoder_hash_byte_group_vocab)
            return collectives.collect(some, ranks, EMBEDDING, differ=False)

        _specialise(module, {"embed": embed})
        return module


class Whole(Style):
    """What no other style has taken is whole on every rank; `generate` gets all logits."""

    def _apply(self, module, mesh):
        bias = module._buffers.get("final_logits_bias")
        if bias is not None and not isinstance(bias, DTensor):
            _place(module, "final_logits_bias", mesh, 1)
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if not isinstance(parameter, DTensor):
                    _place(part, name, mesh)
        comm.claim(FN, module, mesh)
        ranks, cls = collectives.Ranks(mesh), type(module)

        def advance(self, ids, state):
            logits = cls.advance(self, ids, state)
            if not isinstance(logits, DTensor):
                return logits
            local, words = logits.to_local(), logits.shape[-1]
            return ranks.collect(F.pad(local, (0, -(-words // ranks.size) - local.shape[-1])), HEAD)[..., :words]

        def get_parameter(self, target):
            owner, _, leaf = target.rpartition(".")
            found = self.get_submodule(owner)._parameters.get(leaf)
            return cls.get_parameter(self, target) if found is None else found

        _specialise(module, {"advance": advance, "get_parameter": get_parameter})
        return module


# ---- losses of spread logits -------------------------------------------------------------------------------------


def _split(logits):
    """(this rank's logits (..., V / R), the first one's word, the ranks) of a DTensor that is split along the vocabulary."""
    if tuple(logits.placements) != (Shard(logits.dim() - 1),):
        checks.fail("distributed.cross_entropy", f"logits must be split along the vocabulary over one mesh dimension, got {logits.placements}; take logits.full_tensor()")
    ranks = collectives.Ranks(logits.device_mesh)
    return logits.to_local(), ranks.own(logits.shape[-1])[0], ranks


def cross_entropy(logits, labels, ignored=-100):
    """Mean cross entropy of labels (...) given logits (..., V), a DTensor split along V; `ignored` labels don't count. No rank sees another's logits:
    the maximum, the sum of exponentials and the label's logit of each position travel."""
    local, begin, ranks = _split(logits)
    labels = labels.flatten()
    whole, chosen = collectives.judge(local.flatten(0, -2), labels, begin, ranks, LOSS)
    counts = labels != ignored
    return (torch.where(counts, whole - chosen, 0).sum() / counts.sum()).to(logits.dtype)


def logsumexp(logits):
    """(...) of logits (..., V), a DTensor split along V."""
    local, begin, ranks = _split(logits)
    labels = torch.full((math.prod(local.shape[:-1]),), -1, device=local.device)
    return collectives.judge(local.flatten(0, -2), labels, begin, ranks, LOSS)[0].view(local.shape[:-1]).to(logits.dtype)


# ---- checks ------------------------------------------------------------------------------------------------------


def _check_free(model, mesh):
    """Plain parameters everywhere, but for experts that live on another dimension of the same mesh."""
    for path, module in model.named_modules():
        if PACKED in module.__dict__:
            checks.fail(FN, f"the experts of {path} must not be packed, they are; pack no weights that are trained or spread")
        for name, parameter in module._parameters.items():
            if adapters.plain_tensors(parameter):
                continue
            where = f"{path}.{name}".lstrip(".")
            owner = model.get_submodule(path.rpartition(".")[0]) if path else model
            if not isinstance(parameter, DTensor) or not hasattr(owner, "_expert_parallel"):
                kind = "spread over ranks already" if isinstance(parameter, DTensor) else f"a {type(parameter).__name__}"
                checks.fail(FN, f"the parameters of model must be plain tensors, {where} is {kind}; call tensor_parallel before fully_shard and after expert_parallel")
            if parameter.device_mesh == mesh or parameter.device_mesh._get_root_mesh() != mesh._get_root_mesh():
                checks.fail(FN, f"mesh must be another dimension of the mesh that {where} is spread over by expert_parallel, got {mesh} beside {parameter.device_mesh}")
