"""One test per rule: bad input gets a clear error that names function and argument, before any memory is touched."""
import pytest
import terrazzo
import torch

i32 = torch.int32


def conv(**kw):
    args = dict(x=torch.randn(2, 8, 10), weight=torch.randn(8, 4)) | kw
    return terrazzo.causal_conv1d_fn(**args)


def varlen(**kw):
    args = dict(x=torch.randn(10, 8), weight=torch.randn(8, 4), bias=None, cu_seqlens=torch.tensor([0, 4, 10], dtype=i32)) | kw
    return terrazzo.causal_conv1d_varlen_fn(**args)


def update(**kw):
    args = dict(x=torch.randn(2, 8), conv_state=torch.randn(2, 8, 4), weight=torch.randn(8, 4)) | kw
    return terrazzo.causal_conv1d_update(**args)


def scan(**kw):
    args = dict(x=torch.randn(1, 6, 4, 8), dt=torch.rand(1, 6, 4), A=-torch.rand(4), B=torch.randn(1, 6, 2, 5), C=torch.randn(1, 6, 2, 5), chunk_size=4) | kw
    return terrazzo.mamba_chunk_scan_combined(**args)


def step(**kw):
    args = dict(state=torch.randn(2, 4, 8, 5), x=torch.randn(2, 4, 8), dt=torch.rand(2, 4, 8), A=-torch.rand(4, 8, 5), B=torch.randn(2, 2, 5),
                C=torch.randn(2, 2, 5)) | kw
    return terrazzo.selective_state_update(**args)


def norm(**kw):
    return terrazzo.rmsnorm_gated(**(dict(x=torch.randn(3, 8), weight=torch.randn(8)) | kw))


def split(**kw):
    args = dict(zxbcdt=torch.randn(1, 6, 2 * 32 + 20 + 4), conv1d_weight=torch.randn(52, 4), conv1d_bias=None, dt_bias=torch.rand(4), A=-torch.rand(4),
                D=torch.rand(4), chunk_size=4, ngroups=2) | kw
    return terrazzo.mamba_split_conv1d_scan_combined(**args)


def states(**kw):
    return terrazzo.causal_conv1d_varlen_states(**(dict(x=torch.randn(10, 8), cu_seqlens=torch.tensor([0, 4, 10], dtype=i32), state_len=3) | kw))


def grouped(**kw):
    args = dict(a=torch.randn(6, 4), b=torch.randn(3, 4, 5), offs=torch.tensor([2, 2, 6], dtype=i32)) | kw
    return terrazzo.grouped_mm(**args)


def gmm(**kw):
    return terrazzo.gmm(**(dict(a=torch.randn(6, 4), b=torch.randn(3, 4, 5), batch_sizes=torch.tensor([2, 0, 4])) | kw))


def linear(**kw):
    return terrazzo.linear(**(dict(x=torch.randn(2, 3, 4), weight=torch.randn(5, 4)) | kw))


def route(**kw):
    return terrazzo.moe_route(**(dict(router_logits=torch.randn(5, 8), top_k=2) | kw))


def permute(**kw):
    return terrazzo.moe_permute(**(dict(indices=torch.tensor([[0, 2], [1, 5]], dtype=i32), num_experts=3) | kw))


def unpermute(**kw):
    args = dict(rows=torch.randn(4, 3), inverse=torch.tensor([2, 0, 1, 3], dtype=i32), weights=torch.rand(2, 2)) | kw
    return terrazzo.moe_unpermute(**args)


def experts(**kw):
    args = dict(x=torch.randn(2, 4), w_gate_up=torch.randn(3, 10, 4), w_down=torch.randn(3, 4, 5), topk_weights=torch.rand(2, 2),
                topk_indices=torch.tensor([[0, 2], [1, 7]], dtype=i32)) | kw
    return terrazzo.fused_experts(**args)


def balance(**kw):
    return terrazzo.load_balancing_loss(**(dict(router_logits=torch.randn(6, 4), num_experts=4, top_k=2) | kw))


def entropy(**kw):
    return terrazzo.entropy_patch(**(dict(logits=torch.randn(2, 6, 9), threshold=2.0) | kw))


def cut(**kw):
    return terrazzo.patch_lengths_from_entropies(**(dict(entropies=torch.rand(2, 6), threshold=0.5) | kw))


def cut_text(**kw):
    return terrazzo.patch_lengths_from_tokens(**(dict(tokens=torch.full((2, 6), 100), mode="space") | kw))


def patch_ids(**kw):
    return terrazzo.patch_ids_from_lengths(**(dict(lengths=torch.tensor([[1, 2, 3]]), length=6) | kw))


def patcher(block=None, lengths=None, **kw):
    return terrazzo.PatcherState(**(dict(batch=2, threshold=1.0) | kw)).update(torch.rand(2, 3) if block is None else block, lengths)


def hashes(**kw):
    args = dict(tokens=torch.tensor([[1, 2, 3]]), table=torch.randn(14, 4), byte_embedding=torch.randn(5, 4), group_sizes=[2, 3], vocab=7) | kw
    return terrazzo.byte_hash_embedding(**args)


BAD = [
    (entropy, dict(logits=torch.randn(6, 9)), ValueError, r"logits must be \(B, L, V\), got \(6, 9\)"),
    (entropy, dict(logits=torch.randn(2, 0, 9)), ValueError, "L must be positive"),
    (entropy, dict(logits=torch.randn(2, 6, 0)), ValueError, "V must be positive"),
    (entropy, dict(threshold=float("nan")), ValueError, "threshold must be finite, got nan"),
    (entropy, dict(threshold=None), ValueError, "None needs patch_size"),
    (entropy, dict(threshold="high"), TypeError, "threshold must be a number, got 'high'"),
    (entropy, dict(monotonic=True, threshold_add=0.1), ValueError, "exclude each other"),
    (entropy, dict(threshold=None, patch_size=4, monotonic=True), ValueError, "need a threshold, got None"),
    (entropy, dict(threshold=None, patch_size=0.5), ValueError, "patch_size must be at least 1, got 0.5"),
    (entropy, dict(max_patch_length=0), ValueError, "max_patch_length must be an integer from 1, got 0"),
    (entropy, dict(max_patches=1), ValueError, "max_patches must be at least"),
    (entropy, dict(cu_seqlens=torch.tensor([0, 6], dtype=i32)), ValueError, "batch of 1"),
    (entropy, dict(valid_lengths=torch.tensor([3, 7], dtype=i32)), ValueError, "valid_lengths must be 0 to 6, the number of positions, got 3 to 7"),
    (entropy, dict(valid_lengths=torch.tensor([3, 6])), TypeError, "valid_lengths must be int32"),
    (cut, dict(entropies=torch.rand(6)), ValueError, r"entropies must be \(B, L\)"),
    (cut, dict(entropies=torch.rand(1, 6), cu_seqlens=torch.tensor([0, 6], dtype=i32), include_next=True), ValueError, "cu_seqlens excludes"),
    (cut_text, dict(mode="words"), ValueError, "mode must be one of space, static, bytes, got 'words'"),
    (cut_text, dict(mode="static"), ValueError, "patch_size goes with mode 'static'"),
    (cut_text, dict(tokens=torch.rand(2, 6)), TypeError, "tokens must be int64, int32"),
    (patch_ids, dict(length=7), ValueError, r"lengths of every row must sum to 7, got \[6\]"),
    (patch_ids, dict(lengths=torch.tensor([[7, -1]])), ValueError, "lengths must not be negative, got -1"),
    (patcher, dict(lengths=torch.tensor([1, 4])), ValueError, "lengths must be 0 to 3, the positions that came, got 1 to 4"),
    (patcher, dict(lengths=torch.tensor([1])), ValueError, "lengths must be"),
    (patcher, dict(threshold=None), TypeError, "threshold is missing"),
    (patcher, dict(block=torch.rand(3, 3)), ValueError, r"entropies must be \(B, K\) = \(2, \*\)"),
    (patcher, dict(dtype=torch.int64), TypeError, "dtype must be float32"),
    (hashes, dict(table=torch.randn(13, 4)), ValueError, r"table must have at least .* = 1 \* 2 \* 7 = 14 rows, got 13"),
    (hashes, dict(table=torch.randn(14, 3)), ValueError, r"table must be \(rows, D\) = \(\*, 4\)"),
    (hashes, dict(table=torch.randn(14, 4).double()), TypeError, "float64 goes with float64 only"),
    (hashes, dict(tokens=torch.tensor([[1, 5]])), ValueError, "tokens must be 0 to 4, the rows of byte_embedding, got 1 to 5"),
    (hashes, dict(tokens=torch.tensor([[-1, 2]])), ValueError, "tokens must be 0 to 4"),
    (hashes, dict(group_sizes=[2, 0]), ValueError, "group_sizes must be integers from 1"),
    (hashes, dict(group_sizes=3), TypeError, "group_sizes must be a list"),
    (hashes, dict(vocab=0), ValueError, "vocab must be an integer from 1"),
    (grouped, dict(a=torch.randn(4)), ValueError, r"a must be \(T, K\)"),
    (grouped, dict(b=torch.randn(3, 5, 4)), ValueError, r"b must be \(E, K, N\) = \(\*, 4, \*\)"),
    (grouped, dict(b=torch.randn(0, 4, 5), offs=torch.zeros(0, dtype=i32)), ValueError, "E must be positive"),
    (grouped, dict(b=torch.randn(3, 4, 5).double()), TypeError, "float64 goes with float64 only, got a float32, b float64"),
    (grouped, dict(b=torch.ones(3, 4, 5, dtype=torch.int8)), TypeError, "b must be float32"),
    (grouped, dict(bias=torch.randn(3, 4)), ValueError, "bias must be"),
    (grouped, dict(offs=torch.tensor([2, 6], dtype=i32)), ValueError, r"offs must be \(E,\) = \(3\)"),
    (grouped, dict(offs=torch.tensor([2, 2, 6])), TypeError, "offs must be int32"),
    (grouped, dict(offs=torch.tensor([4, 2, 6], dtype=i32)), ValueError, "offs must not decrease .* got 2 after 4 at group 1"),
    (grouped, dict(offs=torch.tensor([2, 2, 7], dtype=i32)), ValueError, "end at most at 6, the number of rows, got 7"),
    (grouped, dict(offs=torch.tensor([-1, 2, 6], dtype=i32)), ValueError, "offs must not decrease .* got -1"),
    (gmm, dict(batch_sizes=torch.tensor([2, 0, 3])), ValueError, "batch_sizes must not be negative and sum to 6"),
    (gmm, dict(batch_sizes=torch.tensor([7, -1, 0])), ValueError, "batch_sizes must not be negative"),
    (gmm, dict(batch_sizes=torch.tensor([2.0, 0, 4])), TypeError, "batch_sizes must be int64, int32"),
    (gmm, dict(batch_sizes=torch.tensor([2, 4])), ValueError, r"b must be \(E, K, N\) = \(2, 4, \*\)"),
    (gmm, dict(trans_a=True, trans_b=True), ValueError, "trans_a and trans_b exclude each other"),
    (gmm, dict(trans_a=True), ValueError, r"b must be \(T, N\)"),
    (gmm, dict(trans_b=True), ValueError, r"b must be \(E, N, K\)"),
    (linear, dict(x=torch.tensor(1.0)), ValueError, "x must be"),
    (linear, dict(x=torch.randn(2, 5)), ValueError, r"x must be \(..., K\) = \(\*, 4\)"),
    (linear, dict(weight=torch.randn(5)), ValueError, r"weight must be \(N, K\)"),
    (linear, dict(bias=torch.randn(4)), ValueError, "bias must be"),
    (linear, dict(weight=torch.randn(5, 4).double()), TypeError, "float64 goes with float64 only"),
    (linear, dict(activation="tanh"), ValueError, "activation must be one of .* got 'tanh'"),
    (linear, dict(activation="swiglu_oai"), ValueError, "activation must be one of"),
    (route, dict(router_logits=torch.randn(8)), ValueError, r"router_logits must be \(T, E\)"),
    (route, dict(top_k=9), ValueError, "top_k must be an integer from 1 to 8, the number of experts, got 9"),
    (route, dict(top_k=0), ValueError, "top_k must be an integer"),
    (route, dict(norm_order=0), ValueError, "norm_order must be None or positive"),
    (route, dict(bias=torch.randn(7)), ValueError, "bias must be"),
    (route, dict(n_group=2), ValueError, "n_group and topk_group go together"),
    (route, dict(n_group=3, topk_group=1), ValueError, "n_group must divide the 8 experts, got 3"),
    (route, dict(n_group=2, topk_group=3), ValueError, "topk_group must be an integer from 1 to 2"),
    (route, dict(n_group=8, topk_group=1), ValueError, "top_k must be at most the 1 experts of the topk_group groups, got 2"),
    (permute, dict(indices=torch.tensor([[0, -1]], dtype=i32)), ValueError, "indices must not be negative, got -1"),
    (permute, dict(indices=torch.tensor([0, 1])), ValueError, r"indices must be \(T, A\)"),
    (permute, dict(indices=torch.rand(2, 2)), TypeError, "indices must be int32, int64"),
    (permute, dict(num_experts=0), ValueError, "num_experts must be an integer"),
    (unpermute, dict(rows=torch.randn(5, 3)), ValueError, "rows must be"),
    (unpermute, dict(inverse=torch.tensor([0, 1, 2], dtype=i32)), ValueError, "inverse must be"),
    (unpermute, dict(inverse=torch.tensor([0, 1, 1, 3], dtype=i32)), ValueError, "inverse must name each of the 4 rows once"),
    (unpermute, dict(inverse=torch.tensor([0, 1, 2, 4], dtype=i32)), ValueError, "inverse must name each of the 4 rows once"),
    (unpermute, dict(weights=torch.rand(4)), ValueError, r"weights must be \(T, A\)"),
    (experts, dict(x=torch.randn(2, 3)), ValueError, "w_gate_up must have an axis of D = 3"),
    (experts, dict(w_down=torch.randn(4, 4, 5)), ValueError, "w_gate_up must hold 4 experts like w_down, got 3"),
    (experts, dict(num_experts=4), ValueError, "w_gate_up must hold 4 experts like num_experts, got 3"),
    (experts, dict(w_gate_up=torch.randn(3, 9, 4)), ValueError, "w_gate_up must be 2F = 10 wide with a gate, F = 5 without one .* got 9"),
    (experts, dict(w_gate_up=torch.randn(3, 10, 4).double()), TypeError, "float64 goes with float64 only"),
    (experts, dict(w_up=torch.randn(3, 5, 4)), ValueError, "both be F = 5 wide like w_down, got 10 and 5"),
    (experts, dict(w_gate_up=torch.randn(15, 4)), ValueError, "need num_experts"),
    (experts, dict(w_gate_up=torch.randn(16, 4), num_experts=3), ValueError, "num_experts must divide the 16 rows of w_gate_up, got 3"),
    (experts, dict(transposed="yes"), ValueError, "transposed must be None, a bool or a pair"),
    (experts, dict(transposed=True), ValueError, "where `transposed` says"),
    (experts, dict(w_gate_up=torch.randn(3, 5, 4), interleaved=True), ValueError, "interleaved needs gate and up"),
    (experts, dict(w_gate_up=torch.randn(3, 5, 4), activation="swiglu_oai"), ValueError, "needs a gate"),
    (experts, dict(activation="tanh"), ValueError, "activation must be one of"),
    (experts, dict(bias_gate_up=torch.randn(3, 5)), ValueError, "bias_gate_up must be"),
    (experts, dict(bias_up=torch.randn(3, 5)), ValueError, "bias_up needs w_up"),
    (experts, dict(bias_down=torch.randn(3, 5)), ValueError, "bias_down must be"),
    (experts, dict(topk_weights=torch.rand(3, 2)), ValueError, "topk_weights must be"),
    (experts, dict(topk_indices=torch.zeros(2, 3, dtype=i32)), ValueError, "topk_indices must be"),
    (experts, dict(topk_indices=torch.rand(2, 2)), TypeError, "topk_indices must be int32, int64"),
    (experts, dict(topk_indices=torch.tensor([[0, 1], [-1, 0]], dtype=i32)), ValueError, "topk_indices must not be negative, got -1"),
    (balance, dict(num_experts=5), ValueError, "router_logits must be"),
    (balance, dict(top_k=5), ValueError, "top_k must be an integer"),
    (balance, dict(attention_mask=torch.ones(5)), ValueError, "attention_mask must hold one value for each of the 6 tokens"),
    (balance, dict(router_logits=()), ValueError, "at least one layer"),
    (conv, dict(x=torch.randn(8, 10)), ValueError, r"x must be \(B, D, L\), got \(8, 10\)"),
    (conv, dict(x=[1.0]), TypeError, "x must be a tensor"),
    (conv, dict(x=torch.ones(2, 8, 10, dtype=torch.int64)), TypeError, "x must be float32, bfloat16, float16, float64, got int64"),
    (conv, dict(x=torch.randn(2, 8, 0)), ValueError, "L must be positive"),
    (conv, dict(x=torch.randn(2, 0, 5), weight=torch.randn(0, 4)), ValueError, "D must be positive"),
    (conv, dict(weight=torch.randn(7, 4)), ValueError, r"weight must be \(D, W\) = \(8, 2 or more\), got \(7, 4\)"),
    (conv, dict(weight=torch.randn(8, 1)), ValueError, "weight must be"),
    (conv, dict(weight=torch.randn(8, 1, 4)), ValueError, "weight must be"),
    (conv, dict(weight=torch.randn(8, 4, device="meta")), ValueError, "weight must be on cpu"),
    (conv, dict(bias=torch.randn(7)), ValueError, r"bias must be \(D,\) = \(8\), got \(7,\)"),
    (conv, dict(seq_idx=torch.zeros(2, 10, dtype=torch.int64)), TypeError, "seq_idx must be int32, got int64"),
    (conv, dict(seq_idx=torch.zeros(2, 9, dtype=i32)), ValueError, "seq_idx must be"),
    (conv, dict(initial_states=torch.randn(2, 8, 4)), ValueError, "initial_states must be"),
    (conv, dict(final_states_out=torch.randn(2, 8, 3)), ValueError, "final_states_out needs return_final_states"),
    (conv, dict(final_states_out=torch.randn(2, 8, 2), return_final_states=True), ValueError, "final_states_out must be"),
    (conv, dict(activation="gelu"), ValueError, "activation must be None, 'silu' or 'swish', got 'gelu'"),
    (conv, dict(backend="tpu"), ValueError, "backend must be one of"),
    (conv, dict(backend="cuda"), terrazzo.BackendError, "cannot run"),
    (conv, dict(weight=torch.randn(8, 7), backend="cpu"), terrazzo.BackendError, "widths 2 to 4, got 7"),
    (varlen, dict(x=torch.randn(2, 10, 8)), ValueError, r"x must be \(T, D\)"),
    (varlen, dict(x=torch.randn(0, 8)), ValueError, "T must be positive"),
    (varlen, dict(cu_seqlens=None), TypeError, "cu_seqlens is missing"),
    (varlen, dict(cu_seqlens=torch.tensor([0], dtype=i32)), ValueError, "at least one sequence"),
    (varlen, dict(cu_seqlens=torch.tensor([0, 4, 10])), TypeError, "cu_seqlens must be int32"),
    (varlen, dict(cu_seqlens=torch.tensor([0, 6, 4, 10], dtype=i32)), ValueError, "must not decrease, got 6 then 4 at index 2"),
    (varlen, dict(cu_seqlens=torch.tensor([0, -4, 10], dtype=i32)), ValueError, "must not decrease"),
    (varlen, dict(cu_seqlens=torch.tensor([-1, 4, 10], dtype=i32)), ValueError, "must start at 0"),
    (varlen, dict(cu_seqlens=torch.tensor([0, 4, 11], dtype=i32)), ValueError, "end at 10"),
    (varlen, dict(initial_states=torch.randn(1, 8, 3)), ValueError, "initial_states must be"),
    (update, dict(x=torch.randn(2)), ValueError, "x must be"),
    (update, dict(x=torch.randn(2, 8, 0)), ValueError, "L must be positive"),
    (update, dict(bias=torch.ones(8, dtype=i32)), TypeError, "bias must be float32, bfloat16, float16, float64, got int32"),
    (update, dict(conv_state=torch.randn(2, 8, 2)), ValueError, "conv_state must be"),
    (update, dict(conv_state=torch.randn(2, 7, 4)), ValueError, "conv_state must be"),
    (update, dict(conv_state=torch.randn(1, 8, 4)), ValueError, "one slot for each of the 2 rows, got 1"),
    (update, dict(conv_state=torch.randn(3, 8, 4)), ValueError, "pass conv_state_indices"),
    (update, dict(conv_state_indices=torch.tensor([0, 2], dtype=i32)), ValueError, "-1 or below 2, the number of slots, got 2 at row 1"),
    (update, dict(conv_state_indices=torch.tensor([-2, 0], dtype=i32)), ValueError, "conv_state_indices must be -1"),
    (update, dict(conv_state_indices=torch.tensor([0, 1])), TypeError, "conv_state_indices must be int32"),
    (update, dict(cache_seqlens=torch.tensor([0, -1], dtype=i32)), ValueError, "cache_seqlens must not be negative"),
    (update, dict(cache_seqlens=torch.tensor([0], dtype=i32)), ValueError, "cache_seqlens must be"),
    (update, dict(activation="relu"), ValueError, "activation must be"),
    (scan, dict(x=torch.randn(6, 4, 8)), ValueError, r"x must be \(B, L, H, P\)"),
    (scan, dict(x=torch.randn(1, 0, 4, 8)), ValueError, "L must be positive"),
    (scan, dict(x=torch.ones(1, 6, 4, 8, dtype=torch.int32)), TypeError, "x must be float32"),
    (scan, dict(B=torch.randn(1, 5, 2, 5)), ValueError, "B must be"),
    (scan, dict(B=torch.randn(1, 6, 3, 5), C=torch.randn(1, 6, 3, 5)), ValueError, "groups of B must divide the 4 heads of x, got 3"),
    (scan, dict(C=torch.randn(1, 6, 2, 4)), ValueError, "C must be"),
    (scan, dict(C=None), TypeError, "C is missing"),
    (scan, dict(dt=torch.rand(1, 6, 5)), ValueError, "dt must be"),
    (scan, dict(A=-torch.rand(4, 2)), ValueError, "A must be"),
    (scan, dict(D=torch.rand(4, 7)), ValueError, "D must be"),
    (scan, dict(z=torch.randn(1, 6, 4, 7)), ValueError, "z must be"),
    (scan, dict(dt_bias=torch.rand(3)), ValueError, "dt_bias must be"),
    (scan, dict(initial_states=torch.randn(1, 4, 8, 4)), ValueError, "initial_states must be"),
    (scan, dict(seq_idx=torch.zeros(1, 6, dtype=torch.int64)), TypeError, "seq_idx must be int32"),
    (scan, dict(seq_idx=torch.zeros(1, 5, dtype=i32)), ValueError, "seq_idx must be"),
    (scan, dict(cu_seqlens=torch.tensor([0, 3, 2, 6], dtype=i32)), ValueError, "must not decrease"),
    (scan, dict(x=torch.randn(2, 6, 4, 8), dt=torch.rand(2, 6, 4), B=torch.randn(2, 6, 2, 5), C=torch.randn(2, 6, 2, 5),
                cu_seqlens=torch.tensor([0, 6], dtype=i32)), ValueError, "batch of 1"),
    (scan, dict(return_varlen_states=True), ValueError, "needs cu_seqlens"),
    (scan, dict(chunk_size=0), ValueError, "chunk_size must be an integer of at least 1"),
    (scan, dict(dt_limit=(1.0, 0.0)), ValueError, "dt_limit must be"),
    (scan, dict(dt_limit=0.5), ValueError, "dt_limit must be .low, high., got 0.5"),
    (scan, dict(dt_limit=(0.0, float("nan"))), ValueError, "dt_limit must be a number, got nan"),
    (scan, dict(dt_softplus="yes"), TypeError, "dt_softplus must be True or False, got 'yes'"),
    (scan, dict(B=torch.randn(1, 6, 2, 0), C=torch.randn(1, 6, 2, 0)), ValueError, "N must be positive"),
    (step, dict(C=torch.ones(2, 2, 5, dtype=i32)), TypeError, "C must be float32, bfloat16, float16, float64, got int32"),
    (step, dict(D=torch.ones(4, 8, dtype=i32)), TypeError, "D must be float32, bfloat16, float16, float64, got int32"),
    (step, dict(state=torch.randn(2, 4)), ValueError, "state must be"),
    (step, dict(x=torch.randn(2, 4, 7)), ValueError, "x must be"),
    (step, dict(B=torch.randn(2, 3, 5), C=torch.randn(2, 3, 5)), ValueError, "divide the 4 heads"),
    (step, dict(A=-torch.rand(4, 8, 4)), ValueError, "A must be"),
    (step, dict(dt=torch.rand(2, 4)), ValueError, "dt must be"),
    (step, dict(state=torch.randn(3, 4, 8, 5)), ValueError, "one slot for each of the 2 rows, got 3"),
    (step, dict(state_batch_indices=torch.tensor([0, 5], dtype=i32)), ValueError, "below 2, the number of slots, got 5"),
    (step, dict(state=torch.randn(2, 4, 8, 5).double(), backend="cpu"), terrazzo.BackendError, "float64"),
    (norm, dict(x=torch.tensor(1.0)), ValueError, "x must be"),
    (norm, dict(weight=torch.randn(7)), ValueError, "weight must be"),
    (norm, dict(z=torch.randn(3, 7)), ValueError, "z must be"),
    (norm, dict(group_size=3), ValueError, "group_size must divide D = 8, got 3"),
    (norm, dict(x=torch.randn(3, 0), weight=torch.randn(0)), ValueError, "D must be positive"),
    (split, dict(zxbcdt=torch.randn(1, 6, 30)), ValueError, "last dimension of zxbcdt"),
    (split, dict(headdim=7), ValueError, "headdim must be 8"),
    (split, dict(ngroups=0), ValueError, "ngroups must be an integer of at least 1, got 0"),
    (split, dict(conv1d_weight=torch.randn(52, 1)), ValueError, "conv1d_weight must be .*2 or more.*got .52, 1."),
    (split, dict(conv1d_bias=torch.randn(51)), ValueError, "conv1d_bias must be"),
    (split, dict(dt_bias=torch.rand(3)), ValueError, "split_conv1d_scan_combined: dt_bias must be"),
    (split, dict(activation="gelu"), ValueError, "split_conv1d_scan_combined: activation must be None, 'silu' or 'swish'"),
    (split, dict(rmsnorm_weight=torch.rand(31)), ValueError, "rmsnorm_weight must be .H.P,. = .32."),
    (split, dict(rmsnorm_eps=-1.0), ValueError, "rmsnorm_eps must be a number of at least 0, got -1.0"),
    (split, dict(outproj_weight=torch.randn(5, 31)), ValueError, "outproj_weight must be .out, H.P."),
    (split, dict(outproj_weight=torch.randn(5, 32), outproj_bias=torch.randn(4)), ValueError, "outproj_bias must be .out,. = .5."),
    (split, dict(outproj_bias=torch.randn(5)), ValueError, "outproj_bias needs outproj_weight"),
    (update, dict(conv_state=torch.zeros(1, 8, 4).expand(2, 8, 4)), ValueError, "conv_state is updated in place and must not be expanded"),
    (update, dict(weight=torch.randn(8, 4, device="meta")), ValueError, "weight must be on cpu"),
    (step, dict(state=torch.zeros(1, 4, 8, 5).expand(2, 4, 8, 5)), ValueError, "state is updated in place and must not be expanded"),
    (step, dict(A=torch.rand(4, 8, 5, device="meta")), ValueError, "A must be on cpu"),
    (balance, dict(attention_mask=[1] * 3), TypeError, "attention_mask must be a tensor .B, L. or .T,., got list"),
    (balance, dict(num_experts=None), ValueError, "num_experts must be an integer of at least 1, got None"),
    (norm, dict(eps=float("nan")), ValueError, "eps must be a number of at least 0, got nan"),
    (norm, dict(eps="small"), TypeError, "eps must be a number, got 'small'"),
    (conv, dict(activation=["silu"]), ValueError, "activation must be None, 'silu' or 'swish', got .'silu'."),
    (conv, dict(return_final_states=True, final_states_out=torch.zeros(1, 8, 3).expand(2, 8, 3)), ValueError, "final_states_out is updated in place"),
    (states, dict(state_len=0), ValueError, "state_len must be an integer of at least 1"),
    (states, dict(x=torch.randn(10)), ValueError, "x must be"),
]


@pytest.mark.parametrize("call, kwargs, error, message", BAD, ids=[f"{c.__name__}-{m}" for c, _, _, m in BAD])
def test_bad_input(call, kwargs, error, message):
    call()  # the good call works
    before = {k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
    with pytest.raises(error, match=message) as caught:
        call(**kwargs)
    assert str(caught.value).startswith("terrazzo.")
    for name, value in before.items():
        assert torch.equal(kwargs[name], value)


def layer(**kw):
    return terrazzo.norm_linear(**(dict(x=torch.randn(2, 4), weight=torch.randn(5, 4), weight2=torch.randn(5, 4)) | kw))


def attend(**kw):
    args = dict(qkv=torch.randn(2, 64), k_cache=torch.randn(2, 2, 9, 8), v_cache=torch.randn(2, 2, 9, 8), cache_seqlens=3) | kw
    return terrazzo.attention_update(**args)


BAD_STEPS = [
    (layer, dict(x=torch.randn(2, 1, 4)), ValueError, r"x must be \(T, K\), got \(2, 1, 4\)"),
    (layer, dict(weight=torch.randn(5, 3)), ValueError, r"weight must be \(N, K\) = \(\*, 4\), got \(5, 3\)"),
    (layer, dict(weight2=torch.randn(4)), ValueError, r"weight2 must be \(N, K\)"),
    (layer, dict(weight2=None, weight3=torch.randn(5, 4)), ValueError, "weight3 goes behind weight2, which is missing"),
    (layer, dict(weight2=torch.randn(5, 4).double()), TypeError, "float64 goes with float64 only"),
    (layer, dict(weight=torch.randn(0, 4)), ValueError, "N must be positive"),
    (layer, dict(norm_weight=torch.randn(5)), ValueError, r"norm_weight must be \(K,\)"),
    (layer, dict(residual=torch.randn(2, 5)), ValueError, r"residual must be \(T, columns of y\) = \(2, 10\), got \(2, 5\)"),
    (layer, dict(gated=True, weight2=torch.randn(3, 4)), ValueError, r"gated needs weight and weight2 of one shape and no third, got \(5, 4\), \(3, 4\)"),
    (layer, dict(gated=True, weight3=torch.randn(5, 4)), ValueError, "gated needs weight and weight2 of one shape and no third"),
    (layer, dict(activation="tanh"), ValueError, "activation must be one of .* got 'tanh'"),
    (layer, dict(weight=torch.randn(5, 4).requires_grad_(), backend="cpu"), terrazzo.BackendError, "no gradient on the cpu backend"),
    (attend, dict(qkv=torch.randn(2, 1, 64)), ValueError, r"qkv must be \(B, \(H \+ 2 Hk\) P\), got \(2, 1, 64\)"),
    (attend, dict(qkv=torch.randn(2, 32)), ValueError, "with H a multiple of Hk = 2 and P = 8"),
    (attend, dict(qkv=torch.randn(2, 72)), ValueError, "with H a multiple of Hk = 2 and P = 8"),
    (attend, dict(qkv=torch.randn(2, 63)), ValueError, "with H a multiple of Hk = 2 and P = 8"),
    (attend, dict(k_cache=torch.randn(3, 2, 9, 8)), ValueError, "k_cache must be"),
    (attend, dict(v_cache=torch.randn(2, 2, 8, 8)), ValueError, "v_cache must be"),
    (attend, dict(v_cache=torch.randn(2, 2, 9, 8).bfloat16()), TypeError, "v_cache must be float32, got bfloat16"),
    (attend, dict(cache_seqlens=9), ValueError, "k_cache must have a slot for each of the 10 positions that are seen, got 9"),
    (attend, dict(cache_seqlens=-1), ValueError, "cache_seqlens must be an integer of at least 0, got -1"),
    (attend, dict(cache_seqlens=torch.tensor([2, 9])), ValueError, "k_cache must have a slot for each of the 10 positions that are seen, got 9"),
    (attend, dict(cache_seqlens=torch.tensor([-2, 0]), window=4), ValueError, "cache_seqlens must not be negative, got -2"),
    (attend, dict(cache_seqlens=torch.tensor([2])), ValueError, r"cache_seqlens must be \(B,\)"),
    (attend, dict(cache_seqlens=torch.tensor([2.0, 1.0])), TypeError, "cache_seqlens must be int32, int64"),
    (attend, dict(window=0), ValueError, "window must be an integer of at least 1, got 0"),
    (attend, dict(window=12, cache_seqlens=30), ValueError, "k_cache must have a slot for each of the 12 positions that are seen, got 9"),
    (attend, dict(rotary_cos=torch.rand(1, 2)), ValueError, "rotary_cos and rotary_sin go together"),
    (attend, dict(rotary_cos=torch.rand(1, 5), rotary_sin=torch.rand(1, 5)), ValueError, "2 R at most P = 8"),
    (attend, dict(rotary_cos=torch.rand(3, 2), rotary_sin=torch.rand(3, 2)), ValueError, r"rotary_cos must be \(1 or B, R\)"),
    (attend, dict(rotary_cos=torch.rand(1, 2), rotary_sin=torch.rand(1, 3)), ValueError, "rotary_sin must be like rotary_cos"),
    (attend, dict(k_cache=torch.randn(2, 2, 8, 9).mT, backend="cpu"), terrazzo.BackendError, "unit stride along P"),
    (attend, dict(qkv=torch.randn(2, 64).requires_grad_(), backend="cpu"), terrazzo.BackendError, "no gradient on the cpu backend"),
]


@pytest.mark.parametrize("call, kwargs, error, message", BAD_STEPS, ids=[f"{c.__name__}-{m}" for c, _, _, m in BAD_STEPS])
def test_bad_steps(call, kwargs, error, message):
    test_bad_input(call, kwargs, error, message)


def test_decoding_kernels_check_for_themselves():
    ops, x, cache = torch.ops.terrazzo, torch.randn(2, 4), torch.randn(2, 2, 9, 8)
    for weight, weight2, norm, gated, residual, message in (
        (torch.randn(5, 3), None, None, False, None, "weight must have shape"), (torch.randn(5, 4), torch.randn(3, 4), None, True, None, "gated needs"),
        (torch.randn(5, 4), None, torch.randn(5), False, None, "norm_weight must have shape"),
        (torch.randn(5, 4), None, None, False, torch.randn(2, 4), "residual must have shape"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"terrazzo.norm_linear: {message}"):
            ops.norm_linear(x, weight, weight2, None, norm, 1e-6, 0, gated, residual)
    for qkv, v_cache, length, lengths, window, message in (
        (torch.randn(2, 64), cache, 9, None, 0, "for each of the 10 positions"), (torch.randn(2, 64), cache, -1, None, 3, "cache_seqlens must not be negative"),
        (torch.randn(2, 64), cache, 0, torch.tensor([0, 99]), 0, "for each of the 100 positions"), (torch.randn(2, 64), cache, 10, None, 10, "for each of the 10"),
        (torch.randn(2, 60), cache, 0, None, 0, "qkv must be"), (torch.randn(2, 64), cache[:, :, :8], 0, None, 0, "v_cache must have shape"),
        (torch.randn(2, 64), cache.double(), 0, None, 0, "must have qkv's dtype"), (torch.randn(3, 64), cache, 0, None, 0, "k_cache must have shape"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"terrazzo.attention_update: .*{message}"):
            ops.attention_update(qkv, cache, v_cache, length, lengths, None, None, False, window, 0.3)


PATCHES = torch.tensor([[0, 0, 1, 1, 2]], dtype=i32)


def reduce(**kw):
    return terrazzo.patch_reduce(**(dict(h=torch.randn(1, 5, 4), patch_ids=PATCHES, num_patches=3) | kw))


def cross(**kw):
    args = dict(q=torch.randn(1, 6, 4, 8), k=torch.randn(1, 5, 2, 8), v=torch.randn(1, 5, 2, 8), patch_ids=PATCHES, k_per_patch=2) | kw
    return terrazzo.patch_cross_attention(**args)


def local(**kw):
    return terrazzo.local_attention(**(dict(q=torch.randn(1, 5, 4, 8), k=torch.randn(1, 5, 2, 8), v=torch.randn(1, 5, 2, 8), window=3) | kw))


UNSORTED, CROSSING = torch.tensor([[0, 1, -1, 0, 2]], dtype=i32), torch.tensor([0, 3, 5], dtype=i32)
BAD_PATCHES = [
    (reduce, dict(h=torch.randn(5, 4)), ValueError, r"h must be \(B, L, D\), got \(5, 4\)"),
    (reduce, dict(h=torch.randn(1, 5, 0)), ValueError, "D must be positive"),
    (reduce, dict(num_patches=-1), ValueError, "num_patches must be an integer of at least 0, got -1"),
    (reduce, dict(num_patches=2.0), ValueError, "num_patches must be an integer"),
    (reduce, dict(reduce="sum"), ValueError, "reduce must be one of amax, mean, amin, got 'sum'"),
    (reduce, dict(patch_ids=UNSORTED), ValueError, "patch_ids must not decrease along a row, got 1 then 0 at position 3 of row 0"),
    (reduce, dict(patch_ids=PATCHES[:, 1:]), ValueError, r"patch_ids must be \(B, L\) = \(1, 5\), got \(1, 4\)"),
    (reduce, dict(patch_ids=PATCHES.float()), TypeError, "patch_ids must be int32, int64, got float32"),
    (cross, dict(q=torch.randn(6, 4, 8)), ValueError, r"q must be \(B, Lq, H, P\)"),
    (cross, dict(k=torch.randn(1, 5, 3, 8), v=torch.randn(1, 5, 3, 8)), ValueError, "the heads of k must divide the 4 heads of q, got 3"),
    (cross, dict(v=torch.randn(1, 4, 2, 8)), ValueError, "v must be"),
    (cross, dict(k=torch.randn(1, 5, 2, 7)), ValueError, "k must be"),
    (cross, dict(k=torch.randn(1, 5, 2, 8).double()), TypeError, "float64 goes with float64 only"),
    (cross, dict(queries="tokens"), ValueError, "queries must be 'patches' or 'bytes', got 'tokens'"),
    (cross, dict(queries="bytes"), ValueError, r"k must hold num_patches \* k_per_patch = 2 \* 2 rows, got 5"),
    (cross, dict(k_per_patch=0), ValueError, "k_per_patch must be an integer of at least 1, got 0"),
    (cross, dict(num_patches=4), ValueError, r"q must hold num_patches \* k_per_patch = 4 \* 2 rows, got 6"),
    (cross, dict(window=0), ValueError, "window must be an integer of at least 1, got 0"),
    (cross, dict(patch_ids=UNSORTED), ValueError, "patch_ids must not decrease"),
    (cross, dict(cu_seqlens=CROSSING), ValueError, "a patch must not lie in two sequences of cu_seqlens, patch 1 does at position 3"),
    (cross, dict(cu_seqlens=torch.tensor([0, 4], dtype=i32)), ValueError, "must start at 0 and end at 5"),
    (cross, dict(cu_seqlens=torch.tensor([0, 2, 5], dtype=i32), window=2), ValueError, "window and cu_seqlens don't go together"),
    (cross, dict(key_mask=torch.ones(1, 5)), TypeError, "key_mask must be bool"),
    (cross, dict(key_mask=torch.ones(1, 6, dtype=torch.bool)), ValueError, "key_mask must be"),
    (local, dict(window=0), ValueError, "window must be an integer of at least 1, got 0"),
    (local, dict(window=None), ValueError, "window must be an integer"),
    (local, dict(k=torch.randn(1, 4, 2, 8), v=torch.randn(1, 4, 2, 8)), ValueError, r"k must be \(B, L, Hk, P\) = \(1, 5, \*, 8\)"),
    (local, dict(q=torch.randn(1, 5, 4, 0), k=torch.randn(1, 5, 2, 0), v=torch.randn(1, 5, 2, 0)), ValueError, "P must be positive"),
    (local, dict(cu_seqlens=torch.tensor([0, 6], dtype=i32)), ValueError, "must start at 0 and end at 5"),
    (local, dict(key_mask=torch.ones(1, 4, dtype=torch.bool)), ValueError, "key_mask must be"),
    (local, dict(backend="cuda"), terrazzo.BackendError, "cannot run"),
]


@pytest.mark.parametrize("call, kwargs, error, message", BAD_PATCHES, ids=[f"{c.__name__}-{m}" for c, _, _, m in BAD_PATCHES])
def test_bad_patches(call, kwargs, error, message):
    test_bad_input(call, kwargs, error, message)


def test_patch_kernels_check_for_themselves():
    ops, heads = torch.ops.terrazzo, (torch.randn(1, 6, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8))
    with pytest.raises(RuntimeError, match="terrazzo.patch_reduce: patch_ids must not decrease along a row, got 1 then 0 at position 3 of row 0"):
        ops.patch_reduce_fwd(torch.randn(1, 5, 4), UNSORTED, 3, 0)
    with pytest.raises(RuntimeError, match="terrazzo.patch_reduce: reduce must be 0 to 2, got 3"):
        ops.patch_reduce_fwd(torch.randn(1, 5, 4), PATCHES, 3, 3)
    with pytest.raises(RuntimeError, match="terrazzo.patch_cross_attention: q must hold num_patches"):
        ops.patch_cross_attention_fwd(*heads, PATCHES, 4, False, 2, 1.0, 1, None, None)
    with pytest.raises(RuntimeError, match="patch 1 does at position 3"):
        ops.patch_cross_attention_fwd(*heads, PATCHES, 3, False, 2, 1.0, 1, None, CROSSING)
    with pytest.raises(RuntimeError, match="terrazzo.local_attention: k must have as many positions as q, 6, got 5"):
        ops.local_attention_fwd(*heads, 3, True, 1.0, None, None)


def test_kernels_check_for_themselves():
    """torch.ops callers and compiled graphs skip the Python checks: the native layer refuses what would touch foreign memory."""
    ops = torch.ops.terrazzo
    x, w = torch.randn(1, 8, 10), torch.randn(8, 4)
    for cu in ([0, 12], [0, 8, 4, 10], [-1, 10]):
        with pytest.raises(RuntimeError, match="terrazzo.causal_conv1d_fn: cu_seqlens"):
            ops.causal_conv1d_fwd(x, w, None, None, torch.tensor(cu, dtype=i32), None, False, True)
    with pytest.raises(RuntimeError, match="conv_state_indices must be -1 or below 2, got 9"):
        ops.causal_conv1d_update(x, torch.randn(2, 8, 4), w, None, True, None, torch.tensor([9], dtype=i32))
    with pytest.raises(RuntimeError, match="conv_state is updated in place and must not be expanded"):
        ops.causal_conv1d_update(x, torch.randn(1, 1, 4).expand(1, 8, 4), w, None, True, None, None)
    with pytest.raises(ValueError, match="terrazzo.causal_conv1d_update: all tensors must be on one device, got cpu, meta"):
        ops.causal_conv1d_update(x, torch.randn(1, 8, 4), w.to("meta"), None, True, None, None)
    with pytest.raises(RuntimeError, match="bias must have shape"):
        ops.causal_conv1d_fwd(x, w, torch.randn(3), None, None, None, False, True)
    with pytest.raises(RuntimeError, match="weight must have shape"):
        ops.rmsnorm_gated_fwd(torch.randn(3, 8), torch.randn(4), None, 1e-6, 8, True)
    with pytest.raises(RuntimeError, match="terrazzo.moe_route: top_k must be 1 to 4"):
        ops.moe_route_fwd(torch.randn(3, 4), None, 5, 0.0, True, False, 0, 0, 1.0)
    with pytest.raises(RuntimeError, match="terrazzo.moe_route: indices must be below 4"):
        ops.moe_route_bwd(torch.randn(1, 1), torch.randn(1, 4), torch.tensor([[4]], dtype=i32), 0.0, True, False, 1.0)
    with pytest.raises(RuntimeError, match="terrazzo.moe_permute: indices must not be negative, got -3"):
        ops.moe_permute(torch.tensor([[1, -3]], dtype=i32), 2)
    with pytest.raises(RuntimeError, match="terrazzo.byte_hash_embedding: tokens must be 0 to 4, got 9"):
        ops.byte_hash_embedding_fwd(torch.tensor([[9]]), torch.randn(14, 4), torch.randn(5, 4), [2, 3], 1, 7, None, False)
    with pytest.raises(RuntimeError, match="terrazzo.byte_hash_embedding: table must have at least"):
        ops.byte_hash_embedding_fwd(torch.tensor([[1]]), torch.randn(13, 4), torch.randn(5, 4), [2, 3], 1, 7, None, False)
    with pytest.raises(RuntimeError, match="terrazzo.entropy_patch: valid_lengths must be 0 to 3, got 4"):
        ops.entropy_patch_fwd(torch.randn(1, 3, 5), 1.0, 0, 0.0, 1.0, 0, None, torch.tensor([4], dtype=i32), False)
    with pytest.raises(RuntimeError, match="terrazzo.patch_ids_from_lengths: lengths must not be negative"):
        ops.patch_ids(torch.tensor([[-2, 3]]), 3)
    with pytest.raises(RuntimeError, match="terrazzo.moe_unpermute: inverse must name each of the 2 rows once, got 7"):
        ops.moe_unpermute_fwd(torch.randn(2, 3), torch.tensor([0, 7], dtype=i32), torch.rand(1, 2))
