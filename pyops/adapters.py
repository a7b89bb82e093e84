"""The functions terrazzo.patch puts in the place of transformers' own: the same parameters, calling terrazzo's ops.

Each factory takes the replaced function and the backend asked for (None: automatic). A call that no native backend
can serve (a convolution of 7 taps, a decode step that needs gradients, no compiled extension) goes to the replaced
function, so that a patched model is never slower. Packed sequences (seq_idx), which transformers' own code
refuses, always run here.
"""
import inspect
import os

import torch
from torch import nn

from . import dispatch, native, packing
from .causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from .chunk_scan import mamba_chunk_scan_combined
from .fused_experts import fused_experts
from .grouped_gemm import grouped_mm
from .linear import linear_by
from .local_attention import local_attention
from .moe import moe_permute, moe_unpermute
from .rmsnorm_gated import rmsnorm_gated
from .state_update import selective_state_update

SILU = (None, "silu", "swish")


def serving(op, *tensors, backend=None):
    """(backend, "") that will serve this call of `op`, or (None, why transformers' own code does)."""
    if dispatch._wanted(dispatch.OPS[op], backend)[0] is not None:
        return dispatch.pick(op, *tensors, backend=backend)[0], ""
    refusals = []
    for candidate in dispatch.PREFERENCE.get(tensors[0].device.type, ()):
        why = dispatch.can_run(op, candidate, *tensors)
        if why is None:
            return candidate, ""
        refusals.append(f"{candidate}: {why}")
    return None, "; ".join(refusals) or f"no kernels for {tensors[0].device.type} tensors"


def conv(original, backend):
    def terrazzo_causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, seq_idx=None, stretch=None, **kwargs):
        if stretch is not None:  # of rows that are sharded: terrazzo.distributed.context_parallel
            return stretch.convolve(hidden_states, weight, bias)
        chosen, _ = serving("causal_conv1d_fn", hidden_states, weight, bias, backend=backend)
        packed = seq_idx is not None
        if activation not in SILU or (chosen is None and not packed):
            return original(hidden_states, weight, bias, activation=activation, seq_idx=seq_idx)
        return causal_conv1d_fn(hidden_states, weight, bias, seq_idx, activation=activation, backend=chosen)

    return terrazzo_causal_conv1d_fn


def conv_update(original, backend):
    def terrazzo_causal_conv1d_update(hidden_states, conv_state, weight, bias=None, activation=None):
        chosen, _ = serving("causal_conv1d_update", hidden_states, weight, bias, conv_state, backend=backend)
        if chosen is None or activation not in SILU:
            return original(hidden_states, conv_state, weight, bias, activation=activation)
        return causal_conv1d_update(hidden_states, conv_state, weight, bias, activation, backend=chosen)

    return terrazzo_causal_conv1d_update


def state_update(original, backend):
    def terrazzo_selective_state_update(
        state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs
    ):
        tensors = (hidden_states, state, dt, A, B, C, D, z, dt_bias)
        chosen, _ = serving("selective_state_update", *tensors, backend=backend)
        if chosen is None:
            return original(
                state, hidden_states, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z
            )
        return selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus, backend=chosen)

    return terrazzo_selective_state_update


def chunk_scan(original, backend):
    def terrazzo_chunk_scan(
        hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
        dt_limit=(0.0, float("inf")), return_final_states=False, seq_idx=None, stretch=None, **kwargs,
    ):
        if stretch is not None:
            return stretch.scan(hidden_states, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=tuple(dt_limit))
        tensors = (hidden_states, dt, A, B, C, D, None, dt_bias, initial_states)
        chosen, _ = serving("mamba_chunk_scan_combined", *tensors, backend=backend)
        options = dict(
            D=D, dt_bias=dt_bias, initial_states=initial_states, dt_softplus=dt_softplus, dt_limit=tuple(dt_limit),
            return_final_states=return_final_states,
        )
        if chosen is None and seq_idx is None:
            return original(hidden_states, dt, A, B, C, chunk_size, **options)
        return mamba_chunk_scan_combined(
            hidden_states, dt, A, B, C, chunk_size, seq_idx=seq_idx, backend=chosen, **options
        )

    return terrazzo_chunk_scan


def split_scan(original, backend):
    """None means "go on": the mixer then runs convolution, scan and norm one by one, which are all replaced here,
    and, unlike the fused function, keeps padding out of the scan."""

    def terrazzo_split_scan(*args, **kwargs):
        return None

    return terrazzo_split_scan


def _gated_norm(module, x, gate, backend, group_size, norm_before_gate):
    """(y in x's dtype, or None when transformers' own code serves)."""
    chosen, _ = serving("rmsnorm_gated", x, module.weight, gate, backend=backend)
    if chosen is None:
        return None
    return rmsnorm_gated(
        x, module.weight, gate, module.variance_epsilon, group_size, norm_before_gate, backend=chosen
    )


def norm_gate_first(original, backend):
    def forward(self, hidden_states, gate=None):
        y = _gated_norm(self, hidden_states, gate, backend, self.group_size, False)
        if y is None:
            return original(self, hidden_states, gate)
        # transformers multiplies by the weight last, and so returns the wider of the two dtypes.
        return y.to(torch.promote_types(y.dtype, self.weight.dtype))

    return forward


def norm_first(original, backend):
    def forward(self, hidden_states, gate):
        y = None
        if self.activation in SILU:
            y = _gated_norm(self, hidden_states, gate, backend, None, True)
        return original(self, hidden_states, gate) if y is None else y

    return forward


def norm_falcon_h1(original, backend):
    def forward(self, hidden_states, gate=None):
        group_size = hidden_states.shape[-1] // self.n_groups
        y = _gated_norm(self, hidden_states, gate, backend, group_size, self.norm_before_gate)
        return original(self, hidden_states, gate) if y is None else y

    return forward


# ---- experts -------------------------------------------------------------------------------------------------

# transformers' activations, the full names of their classes or functions -> terrazzo's name
ACTIVATIONS = {
    "torch.nn.functional.silu": "silu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.ReLUSquaredActivation": "relu2",
}
# Gates that are act_fn(gate) * up; the second computes it in float32, as terrazzo always does.
PLAIN_GATES = (
    "transformers.integrations.moe._default_apply_gate",
    "transformers.models.beam.modeling_beam.BeamExperts._apply_gate",
)
# Gates that are "swiglu_oai" -> (interleaved, attribute of alpha, attribute of the limit)
CLAMPED_GATES = {
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts._apply_gate": (True, "alpha", "limit"),
    "transformers.models.openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts._apply_gate":
        (False, "alpha", "limit"),
    "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts._apply_gate":
        (False, "swiglu_alpha", "swiglu_limit"),
}


def _full_name(thing):
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


@torch.compiler.assume_constant_result
def gate_name(cls):
    """The full name of the gate of a class of experts."""
    return _full_name(cls._apply_gate)


@torch.compiler.assume_constant_result
def _known_activation(kind):
    return ACTIVATIONS.get(_full_name(kind))


def activation_name(activation):
    """terrazzo's name of an activation, a module or a function; None where it has none."""
    return _known_activation(type(activation) if isinstance(activation, nn.Module) else activation)


def fused_options(module):
    """fused_experts' options for these experts, or None: their gate, activation or norm is not one of its own."""
    if module.has_post_expert_norm:
        return None
    gate = gate_name(type(module)) if module.has_gate else PLAIN_GATES[0]
    if gate in CLAMPED_GATES:
        interleaved, alpha, limit = CLAMPED_GATES[gate]
        return dict(activation="swiglu_oai", interleaved=interleaved, alpha=getattr(module, alpha), limit=getattr(module, limit))
    name = activation_name(module.act_fn) if gate in PLAIN_GATES else None
    return None if name is None else dict(activation=name)


def _expert_weights(module):
    """(w_gate_up or w_up alone, w_down, their biases or None) of experts behind transformers' ExpertsInterface."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    biases = (getattr(module, first + "_bias"), module.down_proj_bias) if module.has_bias else (None, None)
    return getattr(module, first), module.down_proj, *biases


def plain_tensors(*tensors):
    """False where a tensor subclass (quantised, sharded) keeps its values elsewhere."""
    return all(t is None or type(t) in (torch.Tensor, nn.Parameter) for t in tensors)


# Pairs of token and choice for each expert, above which the products of 16-bit weights compute more than they read.
FEW_ROWS = 24


def better_left(indices, weight, num_experts, backend):
    """Whether torch's products are faster for these choices: transformers' own experts, or terrazzo.models' one by one."""
    return indices.numel() > FEW_ROWS * num_experts and _many_left(weight, backend)


def _many_left(weight, backend):
    """Whether many rows an expert stay with torch: 16 bits, and instructions for them that only torch uses."""
    asked = backend is not None or dispatch._wanted(dispatch.OPS["fused_experts"], None)[0] is not None
    return weight.is_cpu and weight.dtype in TORCH_IS_FAST and not (OWN_BF16 and weight.dtype == torch.bfloat16) and not asked


def experts(original, backend):
    """The forward of experts behind transformers' ExpertsInterface, also what is registered there."""
    def terrazzo_experts(self, hidden_states, top_k_index, top_k_weights):
        w1, w2, bias1, bias2 = _expert_weights(self)
        if hidden_states.dim() != 2 or not plain_tensors(w1, w2, bias1, bias2):
            return original(self, hidden_states, top_k_index, top_k_weights)
        options = fused_options(self)
        if options is None:
            chosen, _ = serving("grouped_mm", hidden_states, w1, w2, bias1, bias2, backend=backend)
            if chosen is not None:
                return _grouped_experts(self, hidden_states, top_k_index, top_k_weights, chosen)
            return original(self, hidden_states, top_k_index, top_k_weights)
        tensors = (hidden_states, w1, None, w2, top_k_weights, bias1, None, bias2)
        chosen, _ = serving("fused_experts", *tensors, backend=backend)
        packed = None if chosen is None else packing.attached(self, tensors)
        if chosen is None or packed is None and better_left(top_k_index, w1, w2.shape[0], backend):
            return original(self, hidden_states, top_k_index, top_k_weights)
        if packed is not None:
            return fused_experts(
                hidden_states, packed, None, top_k_weights, top_k_index, bias_gate_up=bias1, bias_down=bias2, backend=chosen, **options
            )
        return fused_experts(
            hidden_states, w1, w2, top_k_weights, top_k_index, bias_gate_up=bias1, bias_down=bias2,
            transposed=self.is_transposed, backend=chosen, **options,
        )

    return terrazzo_experts


def _grouped_experts(module, x, indices, weights, backend):
    """The module's own gate, activation and norm between two grouped products."""
    w1, w2, bias1, bias2 = _expert_weights(module)
    if not module.is_transposed:
        w1, w2 = w1.mT, w2.mT
    order, inverse, offs = moe_permute(indices, w2.shape[0], backend=backend)
    rows = grouped_mm(x[order // indices.shape[1]], w1, offs, bias1, backend=backend)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = grouped_mm(rows, w2, offs, bias2, backend=backend)
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    return moe_unpermute(rows, inverse, weights, backend=backend)


def dbrx_experts(original, backend):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        w1, v1, w2 = self.mlp.w1, self.mlp.v1, self.mlp.w2
        name = activation_name(self.mlp.activation_fn)
        chosen = None
        if name is not None and plain_tensors(w1, v1, w2):
            chosen, _ = serving("fused_experts", hidden_states, w1, v1, w2, top_k_weights, backend=backend)
        x, options = hidden_states.reshape(-1, self.hidden_size), dict(activation=name, backend=chosen)
        packed = None if chosen is None else packing.attached(self, (x, w1, v1, w2, top_k_weights))
        if chosen is None or packed is None and better_left(top_k_index, w1, self.num_experts, backend):
            return original(self, hidden_states, top_k_index, top_k_weights)
        if packed is not None:
            y = fused_experts(x, packed, None, top_k_weights, top_k_index, **options)
        else:
            y = fused_experts(x, w1, w2, top_k_weights, top_k_index, w_up=v1, num_experts=self.num_experts, **options)
        return y.view(hidden_states.shape[0], -1, self.hidden_size)

    return forward


def expert_layout(module):
    """(w_gate_up, w_down, options of pack_expert_weights) of experts that fused_experts serves."""
    if hasattr(module, "mlp"):  # DbrxExperts
        return module.mlp.w1, module.mlp.w2, dict(w_up=module.mlp.v1, num_experts=module.num_experts)
    w1, w2, _, _ = _expert_weights(module)
    return w1, w2, dict(interleaved=fused_options(module).get("interleaved", False), transposed=module.is_transposed)


# ---- linear layers -------------------------------------------------------------------------------------------

HALF = (torch.bfloat16, torch.float16)
# Values of ONEDNN_MAX_CPU_ISA under which oneDNN may use neither AVX512-BF16 nor AMX.
_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


AMX, AVX512_BF16 = "torch uses this CPU's AMX", "torch uses this CPU's AVX512-BF16"


def _torch_is_fast():
    """{dtype: why torch's own products of this dtype are left to it}, of 16-bit dtypes."""
    highest = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    if highest in _WITHOUT_BF16:
        return {}
    if torch.cpu._is_amx_tile_supported():
        return dict.fromkeys(HALF, AMX)
    return {torch.bfloat16: AVX512_BF16} if torch.cpu._is_avx512_bf16_supported() else {}


TORCH_IS_FAST = _torch_is_fast()


def _own_bf16():
    """Whether the kernels here have the instructions for bfloat16 that make torch fast."""
    own = {"avx512_bf16": (AVX512_BF16,), "amx": (AVX512_BF16, AMX)}.get(native.isa(), ())
    return TORCH_IS_FAST.get(torch.bfloat16) in own


# Then experts are theirs, and linear layers of few rows, where torch reads weights at half of what memory gives.
OWN_BF16 = _own_bf16()
FEW_LINEAR_ROWS = 4 if TORCH_IS_FAST.get(torch.bfloat16) == AMX else 16
# Where the kernels read a weight where it lies while rows stand beside it in a second-level cache (csrc/cpu/gemm.h, swapped).
ROOMY_CACHE = native.second_level_cache() >= 2 << 20
# With AMX on both sides more rows too, without gradients: tiles are read from the weight where it lies, torch copies it first.
STORED_TILES = OWN_BF16 and native.isa() == "amx" and ROOMY_CACHE
STORED_TILE_ROWS, STORED_TILE_WEIGHT, STORED_TILE_DEPTH = 128, 1 << 21, 32  # at most, elements at least, and what divides in_features


def _stored_tiles_serve(x, weight):
    rows = x.numel() <= STORED_TILE_ROWS * x.shape[-1] and x.shape[-1] % STORED_TILE_DEPTH == 0
    return STORED_TILES and rows and weight.numel() >= STORED_TILE_WEIGHT and not dispatch.needs_grad(x, weight)


def _torch_is_slow():
    """Whether torch's products of float32 run in MKL on a CPU of another maker than MKL's, at about half of what the kernels here reach."""
    return native.available and torch.backends.mkl.is_available() and native.cpu_vendor() not in (None, "GenuineIntel")


TORCH_IS_SLOW = _torch_is_slow()
# Float32 products worth the call: weights of a megabyte, which mostly come from memory, or so many multiply-adds.
BIG_WEIGHT, MANY_MULTIPLY_ADDS = 1 << 18, 1 << 23


def _mkl_is_home():
    """Whether torch's products of float32 run in MKL on a CPU of its maker, with the instructions these kernels have."""
    return native.available and native.isa() != "portable" and torch.backends.mkl.is_available() and native.cpu_vendor() == "GenuineIntel"


MKL_IS_HOME = _mkl_is_home()
# Rows with which it is slow there: it takes its way of many rows, which copies weights before it multiplies.
MKL_IS_SLOW_FROM, MKL_IS_SLOW_TO = 2 if native.isa() == "avx2" else 4, 128 if ROOMY_CACHE else 40
# Dtypes whose many rows are about as fast here as in torch, so that what is fused with them is gained: float32 against MKL with AVX2 and
# 2 MB, bfloat16 with AMX on both sides.
FUSING_PAYS = {torch.float32: MKL_IS_HOME and native.isa() == "avx2" and ROOMY_CACHE, torch.bfloat16: OWN_BF16 and native.isa() == "amx"}


def _float32_is_ours(x, weight):
    if not x.is_cpu or not x.dtype == weight.dtype == torch.float32:
        return False
    if TORCH_IS_SLOW:
        return weight.numel() >= BIG_WEIGHT or x.numel() * weight.shape[0] >= MANY_MULTIPLY_ADDS
    few = MKL_IS_SLOW_FROM * x.shape[-1] <= x.numel() <= MKL_IS_SLOW_TO * x.shape[-1]
    return MKL_IS_HOME and few and weight.numel() >= BIG_WEIGHT and not dispatch.needs_grad(x, weight)


def linear_serving(x, weight, bias, backend):
    """serving() for a linear layer: 16-bit weights or inputs where torch has no instructions for them, float32 where its library is slow."""
    half = x.dtype in HALF or weight.dtype in HALF
    if not half and not _float32_is_ours(x, weight):
        return None, f"{str(weight.dtype).removeprefix('torch.')} stays with torch"
    if not plain_tensors(weight, bias):
        return None, f"the weight is a {type(weight).__name__}"
    if x.shape[-1] != weight.shape[1] or not weight.numel():
        return None, "torch says what is wrong with these sizes"
    if torch.is_autocast_enabled(x.device.type):
        return None, "under autocast"
    fast = TORCH_IS_FAST.get(weight.dtype if weight.dtype in HALF else x.dtype) if x.is_cpu else None
    few = OWN_BF16 and x.dtype == weight.dtype == torch.bfloat16 and (x.numel() <= FEW_LINEAR_ROWS * x.shape[-1] or _stored_tiles_serve(x, weight))
    if fast and not few and dispatch._wanted(dispatch.OPS["linear"], backend)[0] is None:
        return None, fast
    return serving("linear", x, weight, bias, backend=backend)


def fused_serves(x, weight):
    """Whether norm_linear is the fastest for many rows x and a weight without bias."""
    if x.is_cpu and x.dtype == weight.dtype and FUSING_PAYS.get(x.dtype):
        return True
    return linear_serving(x, weight, None, None)[0] == "cpu"


def _linear_judged(module, x, backend):
    """(backend or None, note) of a layer whose calls have any number of rows."""
    (one, why_one), (few, _), (some, _), (many, why_many) = (linear_serving(x.expand(rows, -1), module.weight, module.bias, backend) for rows in (1, 8, 32, 1024))
    if few and not one and not many:
        return few, f"for {MKL_IS_SLOW_FROM} to {MKL_IS_SLOW_TO} rows without gradients, else torch's own: {why_one}"
    if one and not many:
        most = f"{STORED_TILE_ROWS} rows, with gradients over {FEW_LINEAR_ROWS}" if some else FEW_LINEAR_ROWS
        return one, f"over {most} rows torch's own: {why_many}"
    if many and not one:
        return many, f"for few rows torch's own: {why_one}"
    return many, why_many


def linear(original, backend):
    def forward(self, input):
        chosen, _ = linear_serving(input, self.weight, self.bias, backend)
        return original(self, input) if chosen is None else linear_by(chosen, input, self.weight, self.bias)

    return forward


# ---- attention ---------------------------------------------------------------------------------------------------

LONG, LONG_WITH_GRADIENTS = 64, 128  # positions from which local_attention is faster than torch's, the second in float32


def attends_faster(q, k, v):
    """Whether local_attention with a window of everything is faster than torch's for q (B, H, L, P), k and v (docs/local_attention.md)."""
    if not native.available or not q.is_cpu or torch.is_autocast_enabled("cpu") or not _attends(q, k, v) or TORCH_IS_FAST.get(q.dtype) == AMX:
        return False
    return q.shape[2] >= (LONG_WITH_GRADIENTS if q.dtype == torch.float32 and dispatch.needs_grad(q, k, v) else LONG)


def _attends(q, k, v):
    """Whether local_attention takes these: as many keys as queries, heads of one width, one dtype."""
    return plain_tensors(q, k, v) and q.dtype == k.dtype == v.dtype and q.shape[2] == k.shape[2] and q.shape[3] == k.shape[3] == v.shape[3]


def attention(interface, backend):
    """transformers' attention functions, with local_attention where "sdpa" has neither mask nor dropout."""
    from transformers.modeling_utils import AttentionInterface

    original = interface["sdpa"]

    def terrazzo_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, position_bias=None, cache=None, **kwargs):
        others = (attention_mask, position_bias, cache, kwargs.get("softcap"), kwargs.get("output_attentions") or None)
        chosen = None
        if not dropout and all(other is None for other in others) and (_attends if backend else attends_faster)(query, key, value):
            chosen, _ = serving("local_attention", query, key, value, backend=backend)
        if chosen is None:
            return original(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, position_bias=position_bias,
                            cache=cache, **kwargs)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return local_attention(q, k, v, q.shape[1], causal=bool(causal), scale=scaling, backend=chosen), None

    found = AttentionInterface()
    found._local_mapping = interface._local_mapping | {"sdpa": terrazzo_attention}
    return found


def _attention_judged(module, tensors, backend):
    config, note = getattr(module, "config", None), f"{LONG} positions or more without a mask or dropout ({LONG_WITH_GRADIENTS} in float32 training), else torch's own"
    if backend is None and not tensors[0].is_cpu:
        return None, "torch's own on GPUs"
    if backend is None and TORCH_IS_FAST.get(tensors[0].dtype) == AMX:
        return None, AMX
    implementation = getattr(config, "_attn_implementation", None)
    if implementation != "sdpa":
        return None, f"attention implementation {implementation!r}, not 'sdpa'"
    chosen, why = serving("local_attention", *tensors, backend=backend)
    return chosen, why or note


# ---- what a report says --------------------------------------------------------------------------------------


def judged(swap, cls, module, backend):
    """(op, backend or None, note): what will serve the calls of this module, or of any of its class (module None)."""
    why = why_not(swap, module)
    if why is not None:
        return swap.op, None, why
    parameter = next(module.parameters(), None) if module is not None else None
    dtype, device = (torch.float32, "cpu") if parameter is None else (parameter.dtype, parameter.device)
    with torch.no_grad():
        if swap.adapter == "linear":
            return swap.op, *_linear_judged(module, torch.empty(1, module.in_features, dtype=dtype, device=device), backend)
        if swap.adapter == "attention":
            return swap.op, *_attention_judged(module, [torch.empty(1, 1, 1, 8, dtype=dtype, device=device)] * 3, backend)
        tensors = probe(swap, module, dtype, device)
        if swap.adapter == "experts" and not (_fusable(cls) if module is None else fused_options(module)):
            chosen, why = serving("grouped_mm", *tensors, backend=backend)
            return "grouped_mm", chosen, why or "its own gate or norm runs between two grouped products"
        chosen, why = serving(swap.op, *tensors, backend=backend)
        if swap.op == "fused_experts" and chosen and not why and _many_left(tensors[0], backend):
            why = f"over {FEW_ROWS} rows an expert transformers' own, unless packed: {TORCH_IS_FAST[tensors[0].dtype]}"
        return swap.op, chosen, why


def _fusable(cls):
    """fused_options() as far as a class of experts can tell: the activation is known of its instances alone."""
    decorated = inspect.getclosurevars(cls.__init__).nonlocals
    if decorated.get("has_post_expert_norm"):
        return False
    return not decorated.get("has_gate", True) or gate_name(cls) in (*PLAIN_GATES, *CLAMPED_GATES)


def probe(swap, module, dtype, device):
    """Tensors like those `module` will pass (module None: of usual sizes), for serving() to judge in a report."""
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    if swap.adapter.startswith("blt_"):
        return (empty(1),) * (3 if swap.op == "byte_hash_embedding" else 1)
    if swap.op == "fused_experts":
        return (empty(1, 8), *(() if module is None else module.parameters()))
    if swap.adapter in ("conv", "conv_update"):
        taps = next((m.weight.squeeze(1) for m in _convolutions(module)), empty(8, 4))
        x = empty(1, taps.shape[0], 1)
        return (x, taps, None) if swap.adapter == "conv" else (x, taps, None, empty(1, *taps.shape))
    N = getattr(module, "ssm_state_size", 16)
    P = getattr(module, "head_dim", 4)
    A = empty(1, dtype=torch.float32)
    if swap.adapter == "state_update":
        state = empty(1, 1, P, N, dtype=torch.float32)
        x = empty(1, 1, P)
        return x, state, x, A.expand(1, P, N), empty(1, 1, N), empty(1, 1, N), x[0], None, x[0]
    if swap.adapter == "chunk_scan":
        BC = empty(1, 1, 1, N)
        return empty(1, 1, 1, P), empty(1, 1, 1), A, BC, BC, A, None, A, None
    weight = module.weight if module is not None else empty(8)
    x = empty(1, 1, weight.shape[0])
    return x, weight, x


def _convolutions(module):
    return [] if module is None else [m for m in module.modules() if isinstance(m, nn.Conv1d)]


def why_not(swap, module):
    """A reason the adapter knows of, other than the backends', for leaving `module`'s calls to transformers."""
    activation = getattr(module, "activation", None)
    if isinstance(activation, str) and activation not in SILU and swap.adapter in ("conv", "conv_update", "norm_first"):
        return f"activation {activation!r} is not served, only silu"
    if swap.adapter == "dbrx_experts" and module is not None and activation_name(module.mlp.activation_fn) is None:
        return f"activation {type(module.mlp.activation_fn).__name__} is not one of fused_experts'"
    if swap.adapter in ("blt_window", "blt_self_attention") and module is not None and not _has_window(module.config):
        return "no window: transformers' full attention"
    if swap.op == "fused_experts" and module is not None and not plain_tensors(*module.parameters()):
        return "its weights are no plain tensors"
    return None


def _has_window(config):
    """Whether a part of BLT attends in a window: the decoder has the encoder's, which its own config doesn't tell."""
    if config.model_type == "blt_local_decoder":
        return True
    return bool(getattr(config, "local_attention_window_len" if config.model_type == "blt" else "sliding_window", None))
