"""Calls of every op at the sizes of real models, for compiling its Triton kernels: tensors are allocated and never filled.

LAUNCHES maps an op of terrazzo.dispatch to its calls. They are the case builders of terrazzo.cases with model sizes; only
integers (offsets, ids, choices of experts) hold values, and
no shape may depend on what a kernel finds (max_patches). Bamba-9B: 128 heads of 64, state 128, width 4096; DBRX: 6144 x 10752, 16
experts, 4 a token; Mixtral: 4096 x 14336, 8 experts, 2 a token; BLT-1B: bytes 1024 wide, 16 heads of 64, window 512.
"""
from collections.abc import Callable
from dataclasses import dataclass

import terrazzo
import torch
from terrazzo import cases, cases_bytes, cases_moe, cases_patches


@dataclass(frozen=True)
class Call:
    """One call of a public function: `build(r, dtype)` makes its arguments; the gradients of `grads` are asked for as well."""

    name: str
    build: Callable
    grads: tuple = ()
    function: str = ""  # where it is not the op's name

    def run(self, op, dtype):
        """Forward and backward by the triton backend."""
        function = _advance_patcher if op == "PatcherState" else getattr(terrazzo, self.function or op)
        cases.run_unwritten(function, self.build, dtype, self.grads, "triton")


def _advance_patcher(entropies, backend, **options):
    return terrazzo.PatcherState(entropies.shape[0], 1.335, dtype=entropies.dtype, backend=backend, **options).update(entropies)


BYTES = 8192
PATCHES = (3, 4, 5, 6) * 455 + (2,)  # 4.5 bytes on average
S = len(PATCHES)
PACKED = [[i // 600 for i in range(4096)]]
ENDS = [0, 512, 513, 2048, 4096]
CONV, SCAN = cases.CONV_GRADS, cases.SCAN_GRADS
SIZES = (3, 4, 5, 6, 7, 8)  # of BLT's n-grams
QKV, EXPERTS = ("q", "k", "v"), cases_moe.EXPERT_GRADS
GROUPED = ("a", "b", "bias")


def _varlen_states(r, dtype):
    return dict(x=r.normal(4096, 8448, dtype=dtype), cu_seqlens=torch.tensor(ENDS, dtype=torch.int32), state_len=3)


def _patcher(batch, **options):
    return lambda r, dtype: dict(entropies=r.normal(batch, 1, dtype=dtype), **options)


LAUNCHES = {
    "causal_conv1d_fn": (
        Call("Bamba-9B, 4096 tokens", cases.conv(B=1, D=8448, L=4096, slack=8320), CONV),
        Call("Bamba-9B, 4096 tokens, states", cases.conv(B=1, D=8448, L=4096, slack=8320, initial=True, final=True), CONV),
        Call("Bamba-9B, packed, states", cases.conv(B=1, D=8448, L=4096, slack=8320, seq_idx=PACKED, initial=True, final=True), CONV),
        Call("Bamba-9B, channel first", cases.conv(B=1, D=8448, L=4096, channel_last=False, initial=True, final=True), CONV),
        Call("LFM2, width 3, no activation", cases.conv(B=2, D=2048, L=1024, W=3, bias=False, activation=None, channel_last=False), CONV),
        Call("Bamba-9B, varlen", cases.conv_varlen((512, 1, 1535, 2048), D=8448), CONV, function="causal_conv1d_varlen_fn"),
    ),
    "causal_conv1d_update": (
        Call("Bamba-9B, batch 1", cases.conv_update(B=1, D=8448)),
        Call("Bamba-9B, batch 32", cases.conv_update(B=32, D=8448)),
        Call("Bamba-9B, slots, 4 positions", cases.conv_update(B=32, D=8448, L=4, state_len=6, slots=40, indices=list(range(32)), channel_last=True)),
        Call("Bamba-9B, circular", cases.conv_update(B=32, D=8448, circular=True, state_len=8)),
        Call("LFM2, width 3", cases.conv_update(B=8, D=2048, W=3, state_len=3, activation=None)),
    ),
    "causal_conv1d_varlen_states": (Call("Bamba-9B", _varlen_states),),
    "mamba_chunk_scan_combined": (
        Call("Bamba-9B, 4096 tokens", cases.scan(B=1, L=4096, H=128, P=64, G=1, N=128), SCAN),
        Call("Bamba-9B, states", cases.scan(B=1, L=4096, H=128, P=64, G=1, N=128, initial=True, final=True), SCAN),
        Call("Bamba-9B, packed, states", cases.scan(B=1, L=4096, H=128, P=64, G=1, N=128, initial=True, final=True, cu=ENDS), SCAN),
        Call("Bamba-9B, seq_idx", cases.scan(B=1, L=4096, H=128, P=64, G=1, N=128, seq_idx=PACKED), SCAN),
        Call("Falcon-H1, state 256", cases.scan(B=1, L=2048, H=24, P=64, G=1, N=256, final=True), SCAN),
        Call("Mamba-2 2.7B, gated", cases.scan(B=2, L=2048, H=80, P=64, G=1, N=128, z=True), SCAN),
        Call("Nemotron-H, 8 groups of heads of 80", cases.scan(B=1, L=2048, H=128, P=80, G=8, N=128), SCAN),
        Call("Zamba-2, state 64", cases.scan(B=1, L=2048, H=64, P=64, G=2, N=64), SCAN),
        Call("H-Net, state 1", cases.scan(B=2, L=2048, H=32, P=32, G=32, N=1, D=None), SCAN),
    ),
    "selective_state_update": (
        Call("Bamba-9B, batch 1", cases.state_update(B=1, H=128, P=64, G=1, N=128, state_dtype=torch.bfloat16)),
        Call("Bamba-9B, batch 32, fp32 state", cases.state_update(B=32, H=128, P=64, G=1, N=128)),
        Call("Bamba-9B, slots", cases.state_update(B=32, H=128, P=64, G=1, N=128, indices=list(range(32)), slots=40, state_dtype=torch.bfloat16)),
        Call("Falcon-H1, state 256, gated", cases.state_update(B=8, H=24, P=64, G=1, N=256, z=True)),
        Call("Falcon-Mamba (Mamba-1)", cases.mamba1_update(B=8, D=8192, N=16)),
    ),
    "rmsnorm_gated": (
        Call("Bamba-9B, 4096 tokens", cases.norm(shape=(1, 4096, 8192)), ("x", "weight", "z")),
        Call("Bamba-9B, batch 1", cases.norm(shape=(1, 1, 8192))),
        Call("Nemotron-H, groups of 1024", cases.norm(shape=(1, 4096, 8192), group_size=1024), ("x", "weight", "z")),
        Call("Qwen3-Next, heads of 128, norm first", cases.norm(shape=(65536, 128), norm_before_gate=True), ("x", "weight", "z")),
        Call("no gate", cases.norm(shape=(4096, 4096), z=False), ("x", "weight")),
    ),
    "grouped_mm": (
        Call("DBRX, up, 2048 tokens", cases_moe.grouped(sizes=(512,) * 16, K=6144, N=10752, transposed=True), GROUPED),
        Call("DBRX, down, 2048 tokens", cases_moe.grouped(sizes=(512,) * 16, K=10752, N=6144), GROUPED),
        Call("Mixtral, up, bias", cases_moe.grouped(sizes=(512,) * 8, K=4096, N=14336, transposed=True, bias=True), GROUPED),
        Call("DBRX, up, one token", cases_moe.grouped(sizes=(1, 0) * 4 + (0,) * 8, K=6144, N=10752, transposed=True)),
        Call("DBRX, gmm", cases_moe.gmm(sizes=(512,) * 16, K=6144, N=10752, trans_b=True), ("a", "b"), function="gmm"),
    ),
    "gmm": (Call("DBRX, weight gradient", cases_moe.gmm(sizes=(512,) * 16, K=6144, N=10752, trans_a=True), ("a", "b")),),
    "linear": (
        Call("Bamba-9B MLP, 2048 tokens", cases_moe.linear(shape=(1, 2048, 4096), N=14336, bias=False, activation="silu"), ("x", "weight", "bias")),
        Call("Bamba-9B MLP, 2048 tokens, bias", cases_moe.linear(shape=(1, 2048, 4096), N=14336), ("x", "weight", "bias")),
        Call("Bamba-9B MLP, batch 1", cases_moe.linear(shape=(1, 1, 4096), N=14336, bias=False)),
        Call("Bamba-9B MLP, batch 32", cases_moe.linear(shape=(32, 1, 4096), N=14336, bias=False)),
    ),
    "moe_route": (
        Call("DBRX, 2048 tokens", cases_moe.route(T=2048, E=16, top_k=4, norm_order=1), ("router_logits",)),
        Call("Mixtral, 32 tokens", cases_moe.route(T=32, E=8, top_k=2, norm_order=1), ("router_logits",)),
        Call("DeepSeek-V3, 2048 tokens", cases_moe.route(T=2048, E=256, top_k=8, sigmoid=True, bias=True, n_group=8, topk_group=4, norm_order=1,
                                                         scale=2.5), ("router_logits",)),
        Call("gpt-oss, 2048 tokens", cases_moe.route(T=2048, E=128, top_k=4, softmax_first=False), ("router_logits",)),
    ),
    "moe_permute": (
        Call("DBRX, 2048 tokens", cases_moe.permute(T=2048, A=4, E=16)),
        Call("DBRX, one token", cases_moe.permute(T=1, A=4, E=16)),
        Call("DeepSeek-V3, 2048 tokens", cases_moe.permute(T=2048, A=8, E=256, index=torch.int64)),
    ),
    "moe_unpermute": (Call("DBRX, 2048 tokens", cases_moe.unpermute(T=2048, A=4, D=6144), ("rows", "weights")),
                      Call("Mixtral, 32 tokens", cases_moe.unpermute(T=32, A=2, D=4096), ("rows", "weights")),
                      Call("64 channels, 2048 tokens", cases_moe.unpermute(T=2048, A=2, D=64), ("rows", "weights"))),
    "fused_experts": (
        Call("DBRX, 2048 tokens", cases_moe.experts(T=2048, D=6144, F=10752, E=16, A=4, layout="dbrx"), EXPERTS),
        Call("DBRX, one token", cases_moe.experts(T=1, D=6144, F=10752, E=16, A=4, layout="dbrx")),
        Call("Mixtral, 2048 tokens", cases_moe.experts(T=2048, D=4096, F=14336, E=8, A=2), EXPERTS),
        Call("Mixtral, 32 tokens", cases_moe.experts(T=32, D=4096, F=14336, E=8, A=2)),
        Call("Mixtral, 8 tokens, trained", cases_moe.experts(T=8, D=4096, F=14336, E=8, A=2), EXPERTS),
        Call("Mixtral, 128 tokens, trained", cases_moe.experts(T=128, D=4096, F=14336, E=8, A=2), EXPERTS),
        Call("gpt-oss, 2048 tokens", cases_moe.experts(T=2048, D=2880, F=2880, E=32, A=4, layout="interleaved", activation="swiglu_oai", bias=True,
                                                      limit=7.0), EXPERTS),
        Call("no gate, 512 tokens", cases_moe.experts(T=512, D=2688, F=1856, E=16, A=4, layout="no_gate", activation="relu2"), EXPERTS),
    ),
    "entropy_patch": (
        Call("BLT, 8192 bytes", cases_bytes.patch(B=1, L=BYTES, threshold=1.335, max_patches=BYTES), ("logits",)),
        Call("BLT, monotonic, longest 16", cases_bytes.patch(B=1, L=BYTES, threshold=0.5, monotonic=True, max_patch_length=16,
                                                             max_patches=BYTES), ("logits",)),
        Call("64 symbols", cases_bytes.patch(B=1, L=BYTES, V=64, threshold=1.335, max_patches=BYTES), ("logits",)),
        Call("BLT, combined, packed", cases_bytes.patch(B=1, L=4096, threshold=1.0, threshold_add=0.2, cu=ENDS, max_patches=4096)),
        Call("BLT, top, 4 texts", cases_bytes.patch(B=4, L=2048, threshold=None, patch_size=4.5, valid=[2048, 1000, 1, 7], max_patches=2048)),
    ),
    "patch_lengths_from_entropies": (
        Call("BLT, 8192 bytes", cases_bytes.lengths(B=1, L=BYTES, include_next=True, max_patches=BYTES)),
        Call("BLT, monotonic, longest 16", cases_bytes.lengths(B=1, L=BYTES, monotonic=True, max_patch_length=16, max_patches=BYTES)),
        Call("BLT, top, packed", cases_bytes.lengths(B=1, L=4096, threshold=None, patch_size=4.5, cu=ENDS, max_patches=4096)),
    ),
    "patch_lengths_from_tokens": (Call("BLT, space", cases_bytes.text("space", L=BYTES, max_patches=BYTES)),
                                  Call("BLT, static", cases_bytes.text("static", L=BYTES, patch_size=6, max_patches=BYTES))),
    "PatcherState": (Call("BLT, batch 1", _patcher(1)),
                     Call("BLT, batch 32, monotonic, longest 16", _patcher(32, monotonic=True, max_patch_length=16))),
    "patch_ids_from_lengths": (Call("BLT, 8192 bytes", cases_bytes.ids([list(PATCHES)], BYTES)),),
    "byte_hash_ids": (Call("BLT, 8192 bytes", cases_bytes.hash_ids(B=1, L=BYTES, group_sizes=SIZES)),),
    "byte_hash_embedding": (
        Call("BLT-1B, 8192 bytes", cases_bytes.hashes(B=1, L=BYTES, D=1024, V=260, vocab=20011, group_sizes=SIZES), ("table", "byte_embedding")),
        Call("BLT-1B, packed", cases_bytes.hashes(B=1, L=4096, D=1024, V=260, vocab=20011, group_sizes=SIZES, cu=ENDS), ("table", "byte_embedding")),
        Call("128 channels", cases_bytes.hashes(B=1, L=BYTES, D=128, V=260, vocab=20011, group_sizes=SIZES), ("table", "byte_embedding")),
        Call("BLT-1B, one byte", cases_bytes.hashes(B=1, L=1, D=1024, V=260, vocab=20011, group_sizes=SIZES)),
    ),
    "patch_reduce": (
        Call("BLT-1B, amax", cases_patches.reduce(lengths=(PATCHES,), S=S, D=1024), ("h",)),
        Call("BLT-1B, mean", cases_patches.reduce(lengths=(PATCHES,), S=S, D=1024, kind="mean"), ("h",)),
    ),
    "patch_cross_attention": tuple(
        Call(f"{name}, {queries} ask{more}", cases_patches.cross(queries, lengths=(PATCHES,), S=S, K=2, H=H, Hk=Hk, P=P, **extra), QKV)
        for queries in ("patches", "bytes")
        for name, H, Hk, P, more, extra in (("BLT-1B", 16, 16, 64, "", {}), ("grouped heads", 32, 8, 128, "", {}),
                                            ("heads of 192", 8, 8, 192, "", {}), ("heads of 256", 8, 4, 256, "", {}),
                                            ("BLT-1B", 16, 16, 64, ", window", dict(window=2)))
    ),
    "local_attention": (
        Call("BLT-1B, window 512", cases_patches.local(B=1, L=BYTES, H=16, P=64, window=512), QKV),
        Call("entropy model, window 512", cases_patches.local(B=1, L=BYTES, H=12, P=64, window=512), QKV),
        Call("grouped heads of 128", cases_patches.local(B=1, L=4096, H=32, Hk=8, P=128, window=512), QKV),
        Call("both sides, packed", cases_patches.local(B=1, L=4096, H=16, P=64, window=512, causal=False,
                                                         cu_seqlens=torch.tensor(ENDS, dtype=torch.int32)), QKV),
        Call("heads of 256", cases_patches.local(B=1, L=2048, H=8, Hk=4, P=256, window=512), QKV),
        Call("padded", cases_patches.local(B=2, L=2048, H=16, P=64, window=512, padding=(100, 0)), QKV),
    ),
}
