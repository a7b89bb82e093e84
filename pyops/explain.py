"""What each backend says to one call of a public function, without running a kernel."""
import inspect
from unittest import mock

import torch

import terrazzo

from . import cases, cases_bytes, cases_decoding, cases_moe, cases_patches, dispatch


def _of_one_group(builder):
    """The builder by the shape (T, K) of its first tensor: all rows belong to one group."""
    return lambda T=17, K=24, **sizes: builder(sizes=(T,), K=K, **sizes)


def _of_one_patch(builder, *args):
    """The builder by (B, L, ...): every row is one patch of L bytes."""
    return lambda B=2, L=12, **sizes: builder(*args, lengths=((L,),) * B, S=1, **sizes)


def _of_query_heads(builder):
    """The builder by (B, width of qkv): two heads of queries, one of keys and one of values."""
    return lambda B=2, D=64, **sizes: builder(B=B, H=2, Hk=1, P=D // 4, **sizes)


# op -> (builder of its arguments, what the sizes of --shape are called there)
CALLS = {
    "causal_conv1d_fn": (cases.conv, ("B", "D", "L")),
    "causal_conv1d_update": (cases.conv_update, ("B", "D", "L")),
    "mamba_chunk_scan_combined": (cases.scan, ("B", "L", "H", "P")),
    "selective_state_update": (cases.state_update, ("B", "H", "P")),
    "rmsnorm_gated": (cases.norm, None),  # any shape
    "linear": (cases_moe.linear, None),
    "norm_linear": (cases_decoding.norm_linear, ("T", "K")),
    "grouped_mm": (_of_one_group(cases_moe.grouped), ("T", "K")),
    "gmm": (_of_one_group(cases_moe.gmm), ("T", "K")),
    "moe_route": (cases_moe.route, ("T", "E")),
    "moe_permute": (cases_moe.permute, ("T", "A")),
    "moe_unpermute": (cases_moe.unpermute, ("T", "A", "D")),
    "fused_experts": (cases_moe.experts, ("T", "D")),
    "entropy_patch": (cases_bytes.patch, ("B", "L", "V")),
    "patch_lengths_from_entropies": (cases_bytes.lengths, ("B", "L")),
    "byte_hash_embedding": (cases_bytes.hashes, ("B", "L")),
    "patch_reduce": (_of_one_patch(cases_patches.reduce), ("B", "L", "D")),
    "patch_cross_attention": (_of_one_patch(cases_patches.cross, "bytes"), ("B", "L", "H", "P")),
    "local_attention": (cases_patches.local, ("B", "L", "H", "P")),
    "attention_update": (_of_query_heads(cases_decoding.attention_update), ("B", "D")),
}


class _Reached(Exception):
    """Ends a call where it would pick a backend."""


def tensors_at_choice(op, arguments):
    """The tensors that the public function hands to pick() for these arguments, checked like any call's."""

    def stop(name, *tensors, backend=None):
        raise _Reached(tensors)

    # Decoding steps that go straight to the kernel are sent the long way, past pick().
    with mock.patch.object(dispatch, "pick", stop), mock.patch.object(dispatch, "cpu_may_serve", lambda op, backend: False):
        try:
            getattr(terrazzo, op)(**arguments)
        except _Reached as reached:
            return reached.args[0]
    raise ValueError(f"terrazzo.{op} chose no backend for this call")


def arguments(op, dtype, shape=None, device="cpu", **sizes):
    """Arguments of a call of `op` whose first tensor has `shape`."""
    if op not in CALLS:
        raise ValueError(f"terrazzo: unknown op {op!r}; ops are {', '.join(CALLS)}")
    builder, names = CALLS[op]
    if shape is not None:
        if names is None:
            sizes["shape"] = tuple(shape)
        elif len(shape) != len(names):
            raise ValueError(f"terrazzo.{op}: the shape must be ({', '.join(names)}), got {tuple(shape)}")
        else:
            groups = {"G": 1} if "G" in inspect.signature(builder).parameters else {}  # one group divides any number of heads
            sizes = groups | dict(zip(names, shape)) | sizes
    try:
        made = builder(**sizes)(cases.Random(0), dtype)
    except TypeError as error:
        raise ValueError(f"terrazzo.{op}: {error}") from None
    if torch.device(device).type == "cpu":
        return made
    # Under FakeTensorMode this works for devices that are not here.
    return {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device) if isinstance(value, torch.Tensor) else value
        for name, value in made.items()
    }  # fmt: skip


def refusals(op, tensors):
    """{backend: None, or why it cannot run}."""
    return {backend: dispatch.can_run(op, backend, *tensors) for backend in dispatch.BACKENDS}
