"""Embeddings of bytes and of the hashed n-grams that end at them. Source: the Byte Latent Transformer, transformers' BLT."""
import torch

from . import checks, dispatch, kernels
from .reference import byte_hash_embedding as reference

OP, IDS = "byte_hash_embedding", "byte_hash_ids"
dispatch.register(OP, OP, ("byte_hash_embedding_fwd", "byte_hash_embedding_bwd"), cpu=lambda tokens, table, byte: dispatch.cpu_dtypes(table, byte),
                  gpu=lambda tokens, table, byte: dispatch.gpu_dtypes(table, byte))
dispatch.register(IDS, OP, ("byte_hash_ids",), cpu=lambda tokens: None, gpu=lambda tokens: None)


def byte_hash_embedding(tokens, table, byte_embedding, group_sizes, num_functions=1, vocab=500002, *, cu_seqlens=None, sparse_grad=False, backend=None):
    """y[b, t] = byte_embedding[tokens[b, t]] + the sum of table[i] over the ids i of `byte_hash_ids` at (b, t).

    Args:
        tokens: (B, L) int64 or int32, each below the rows of byte_embedding and not negative.
        table: (rows, D) float32, bfloat16, float16 or float64, at least num_functions * len(group_sizes) * vocab rows: one
            after the other a table for every function and, within it, n-gram size (transformers' encoder_hash_tok_embedding).
        byte_embedding: (bytes, D) in any of these dtypes; float64 goes with float64.
        group_sizes: n-gram sizes, positive integers (BLT: 3 to 8). num_functions: hash functions, each with its own prime.
        vocab: rows for each function and size.
        cu_seqlens: None, or (sequences + 1,) int32: texts packed into a batch of 1; no n-gram spans two of them.
        sparse_grad: the table's gradient is a coalesced sparse COO tensor (rows, D) of the rows that were read, for optimizers
            that take one (SparseAdam, SGD, Adagrad): a dense one of BLT-1B's table is 12 GB a step.
        backend: "cpu", "reference", ... or None to choose.

    Returns:
        (B, L, D) in byte_embedding's dtype, summed in float32 (float64 for float64) and rounded once. Differentiable in table
        and byte_embedding; gradients are summed in the order of positions, whatever the number of threads.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to: ``byte_embedding[tokens] + table[byte_hash_ids(tokens, group_sizes, num_functions, vocab)].sum(2)``
    """
    group_sizes = _check_hashing(OP, tokens, group_sizes, num_functions, vocab, cu_seqlens)
    checks.check_tensor(OP, "table", table, 2, "(rows, D)", tokens)
    checks.check_tensor(OP, "byte_embedding", byte_embedding, 2, "(bytes, D)", tokens)
    D = byte_embedding.shape[1]
    checks.check_positive(OP, D=D)
    checks.check_shape(OP, "table", table, (None, D), "(rows, D)")
    checks.check_float64(OP, table=table, byte_embedding=byte_embedding)
    checks.check_flags(OP, sparse_grad=sparse_grad)
    if sparse_grad and checks.is_spread(table):
        checks.fail(OP, "sparse_grad must be False where table is a DTensor, which has no sparse gradients")
    needed = num_functions * len(group_sizes) * vocab
    if table.shape[0] < needed:
        checks.fail(OP, f"table must have at least num_functions * len(group_sizes) * vocab = {num_functions} * {len(group_sizes)} * {vocab} = {needed} "
                        f"rows, got {table.shape[0]}")
    if tokens.numel() and checks.has_values(tokens):
        low, high = (int(v) for v in tokens.aminmax())
        if low < 0 or high >= byte_embedding.shape[0]:
            checks.fail(OP, f"tokens must be 0 to {byte_embedding.shape[0] - 1}, the rows of byte_embedding, got {low} to {high}")
    chosen, _ = dispatch.pick(OP, tokens, table, byte_embedding, backend=backend)
    if chosen != "reference":
        return kernels.ops(chosen).byte_hash_embedding_fwd(tokens, table, byte_embedding, group_sizes, num_functions, vocab, cu_seqlens, bool(sparse_grad))
    dispatch.count(OP, chosen)
    return reference.byte_hash_embedding(tokens, table, byte_embedding, group_sizes, num_functions, vocab, cu_seqlens, bool(sparse_grad))


def byte_hash_ids(tokens, group_sizes, num_functions=1, vocab=500002, *, cu_seqlens=None, backend=None):
    """The rows of the table that `byte_hash_embedding` reads, bit for bit those of transformers' BLT.

    The hash of the n bytes that end at t is the sum over j < n of tokens[t - n + 1 + j] * prime**j, in int64 that wraps,
    with zeros before the text; its row is hash % vocab (never negative) + vocab * (function * len(group_sizes) + size).

    Args: as in `byte_hash_embedding`; tokens may be any integers.
    Returns: (B, L, num_functions * len(group_sizes)) int64, function by function and within it size by size.
    """
    group_sizes = _check_hashing(IDS, tokens, group_sizes, num_functions, vocab, cu_seqlens)
    chosen, _ = dispatch.pick(IDS, tokens, backend=backend)
    if chosen != "reference":
        return kernels.ops(chosen).byte_hash_ids(tokens, group_sizes, num_functions, vocab, cu_seqlens)
    dispatch.count(IDS, chosen)
    return reference.byte_hash_ids(tokens, group_sizes, num_functions, vocab, cu_seqlens)


def _check_hashing(fn, tokens, group_sizes, num_functions, vocab, cu_seqlens):
    checks.check_tensor(fn, "tokens", tokens, 2, "(B, L)", dtypes=(torch.int64, torch.int32))
    if not isinstance(group_sizes, (list, tuple)):
        checks.fail(fn, f"group_sizes must be a list of integers, got {type(group_sizes).__name__}", TypeError)
    for size in group_sizes:
        _check_integer(fn, "group_sizes", size, 1, 1 << 20)
    _check_integer(fn, "num_functions", num_functions, 0, 1 << 20)
    _check_integer(fn, "vocab", vocab, 1, 1 << 40)
    checks.check_cu_seqlens(fn, cu_seqlens, tokens.shape[0], tokens.shape[1], tokens)
    return list(group_sizes)


def _check_integer(fn, name, value, low, high):
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        checks.fail(fn, f"{name} must be integers from {low} to {high}, got {value!r}" if name == "group_sizes" else
                        f"{name} must be an integer from {low} to {high}, got {value!r}")


# ---- shapes and gradients of the native ops ----------------------------------------------------------------


@kernels.register_fake("byte_hash_ids")
def _(tokens, group_sizes, num_functions, vocab, cu_seqlens):
    return tokens.new_empty((*tokens.shape, num_functions * len(group_sizes)), dtype=torch.int64)


@kernels.register_fake("byte_hash_embedding_fwd")
def _(tokens, table, byte_embedding, group_sizes, num_functions, vocab, cu_seqlens, sparse_grad):
    return byte_embedding.new_empty((*tokens.shape, byte_embedding.shape[1]))


@kernels.register_fake("byte_hash_embedding_bwd")
def _(dy, tokens, table_like, table_rows, byte_like, byte_rows, group_sizes, num_functions, vocab, cu_seqlens, sparse_grad, need_table, need_bytes):
    D = dy.shape[2]
    rows = torch.library.get_ctx().new_dynamic_size() if need_table and sparse_grad else 0
    dtable = (rows if sparse_grad else table_rows, D) if need_table else 0
    return table_like.new_empty(dtable), byte_like.new_empty((byte_rows, D) if need_bytes else 0), tokens.new_empty(rows, dtype=torch.int64)


def _setup_context(ctx, inputs, output):
    tokens, table, byte_embedding, *rest = inputs
    *ctx.rest, cu_seqlens, ctx.sparse_grad = rest
    ctx.rows = table.shape[0], byte_embedding.shape[0]
    ctx.save_for_backward(tokens, table.new_empty(0), byte_embedding.new_empty(0), cu_seqlens)  # dtypes, not the tables


def _backward(ops, ctx, dy):
    tokens, table_like, byte_like, cu_seqlens = ctx.saved_tensors
    _, need_table, need_bytes = ctx.needs_input_grad[:3]
    dtable, dbytes, rows = ops.byte_hash_embedding_bwd(
        dy, tokens, table_like, ctx.rows[0], byte_like, ctx.rows[1], *ctx.rest, cu_seqlens, ctx.sparse_grad, need_table, need_bytes)
    if need_table and ctx.sparse_grad:
        dtable = torch.sparse_coo_tensor(rows[None], dtable, (ctx.rows[0], dy.shape[2]), check_invariants=False, is_coalesced=True)
    return None, dtable if need_table else None, dbytes if need_bytes else None, None, None, None, None, None


kernels.register_autograd(OP, _backward, _setup_context)
