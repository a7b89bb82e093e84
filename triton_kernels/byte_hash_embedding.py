"""Embeddings of bytes and of the hashed n-grams that end at them: hash and primes as in csrc/cpu/byte_hash_embedding.cpp.

    y[t] = byte_embedding[tokens[t]] + sum over functions f and sizes g of table[id(t, f, g)]
    id   = (sum over j < n of tokens[t - n + 1 + j] p^j, in int64 that wraps) mod vocab + vocab (f G + g)

Layouts: tokens (B, L), table and byte_embedding (rows, D) in any strides, y (B, L, D) contiguous. One program takes BLOCK_T
positions: by Horner each size's hash comes from the next smaller, and rows are gathered as their ids are known. The gather
is the limit: every position reads G + 1 rows that lie anywhere.
Backward: pairs (position, id) sorted by id, stably. A program sums BLOCK_P sorted pairs one after the other and writes the
sum of every run of equal ids that lies within them; a run that goes on leaves its part, and a second kernel joins the parts
in order. So nothing depends on timing, and the many positions of one byte keep many programs busy.
"""
import torch
import triton
import triton.language as tl

from ..reference.byte_hash_embedding import PRIMES
from . import configs
from .search import count_at_most

FWD = configs.Table(
    "byte_hash_embedding_fwd",
    configs.Row({"BLOCK_T": 32, "BLOCK_D": 128}, num_warps=4, up_to={"D": 128}),
    configs.Row({"BLOCK_T": 4, "BLOCK_D": 1024}, num_warps=4, itemsize=2),
    configs.Row({"BLOCK_T": 4, "BLOCK_D": 512}, num_warps=4),
)
BWD = configs.Table(
    "byte_hash_embedding_bwd",
    configs.Row({"BLOCK_P": 64, "BLOCK_D": 1024}, num_warps=4),
)
BLOCK_IDS = 256
BLOCK_PARTS = 16  # parts of a run that are loaded together


@triton.jit
def _positions(tokens_ptr, cu_ptr, L, texts, steps, stride_tokens_b, stride_tokens_l, PACKED: tl.constexpr, BLOCK_T: tl.constexpr):
    """This program's flat positions, where their tokens are, which exist, and how many tokens of their text end there."""
    blocks = tl.cdiv(L, BLOCK_T)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_l = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    available = offs_l + 1
    if PACKED:
        text = tl.minimum(count_at_most(cu_ptr, texts + 1, offs_l, steps) - 1, texts - 1)
        available -= tl.load(cu_ptr + text)
    at = tokens_ptr + row * stride_tokens_b + offs_l.to(tl.int64) * stride_tokens_l
    return row * L + offs_l, at, offs_l < L, tl.where(offs_l < L, available, 0)


@triton.jit
def _prime(function, PRIMES: tl.constexpr):
    prime = tl.full((), PRIMES[0], tl.int64)
    for k in tl.static_range(1, len(PRIMES)):
        prime = tl.where(function % len(PRIMES) == k, PRIMES[k], prime)
    return prime


@triton.jit
def _extend(hash, at, available, prime, stride_tokens_l, SIZES: tl.constexpr, g: tl.constexpr):
    """The hash of SIZES[g] bytes from that of SIZES[g - 1]; sizes usually rise."""
    known: tl.constexpr = SIZES[g - 1] if g > 0 and SIZES[g - 1] <= SIZES[g] else 0
    if known == 0:
        hash = tl.zeros_like(hash)
    for j in range(known, SIZES[g]):
        hash = hash * prime + tl.load(at - tl.cast(j, tl.int64) * stride_tokens_l, mask=j < available, other=0).to(tl.int64)
    return hash


@triton.jit
def _row_of(hash, VOCAB: tl.constexpr):
    left = hash % VOCAB  # has the sign of hash
    return tl.where(left < 0, left + VOCAB, left)


@triton.jit
def byte_hash_ids_kernel(
    tokens_ptr, cu_ptr, ids_ptr, L, functions, texts, steps, stride_tokens_b, stride_tokens_l,
    PRIMES: tl.constexpr, SIZES: tl.constexpr, VOCAB: tl.constexpr, PACKED: tl.constexpr, BLOCK_T: tl.constexpr,
):
    position, at, mask, available = _positions(tokens_ptr, cu_ptr, L, texts, steps, stride_tokens_b, stride_tokens_l, PACKED, BLOCK_T)
    groups: tl.constexpr = len(SIZES)
    hash = tl.zeros((BLOCK_T,), tl.int64)
    for f in range(functions):
        prime = _prime(f, PRIMES)
        for g in tl.static_range(groups):
            hash = _extend(hash, at, available, prime, stride_tokens_l, SIZES, g)
            table = f * groups + g
            tl.store(ids_ptr + position * functions * groups + table, _row_of(hash, VOCAB) + table.to(tl.int64) * VOCAB, mask=mask)


@triton.jit
def byte_hash_embedding_fwd_kernel(
    tokens_ptr, table_ptr, byte_ptr, cu_ptr, y_ptr, L, D, functions, texts, steps,
    stride_tokens_b, stride_tokens_l, stride_table_row, stride_table_d, stride_byte_row, stride_byte_d,
    PRIMES: tl.constexpr, SIZES: tl.constexpr, VOCAB: tl.constexpr, PACKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    position, at, mask_t, available = _positions(tokens_ptr, cu_ptr, L, texts, steps, stride_tokens_b, stride_tokens_l, PACKED, BLOCK_T)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    token = tl.load(at, mask=mask_t, other=0).to(tl.int64)
    acc = tl.load(byte_ptr + token[:, None] * stride_byte_row + offs_d[None, :].to(tl.int64) * stride_byte_d, mask=mask, other=0.0).to(tl.float32)
    groups: tl.constexpr = len(SIZES)
    hash = tl.zeros((BLOCK_T,), tl.int64)
    for f in range(functions):
        prime = _prime(f, PRIMES)
        for g in tl.static_range(groups):
            hash = _extend(hash, at, available, prime, stride_tokens_l, SIZES, g)
            table = f * groups + g
            row = _row_of(hash, VOCAB) + table.to(tl.int64) * VOCAB
            row_ptr = table_ptr + row[:, None] * stride_table_row + offs_d[None, :].to(tl.int64) * stride_table_d
            acc += tl.load(row_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + position[:, None] * D + offs_d[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def byte_hash_embedding_bwd_sums_kernel(
    dy_ptr, rows_ptr, order_ptr, out_ptr, parts_ptr, pairs, D, per_position, stride_dy_t, stride_dy_d, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """out[r] = the sum of dy over the pairs with rows[i] == r, where these BLOCK_P pairs hold them all; else their part.

    parts [chunk, 0] is of a run that began before the chunk, parts [chunk, 1] of one that begins here and goes on behind.
    """
    chunk = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    dy_ptr += offs_d.to(tl.int64) * stride_dy_d
    begin = chunk * BLOCK_P
    end = tl.minimum(begin + BLOCK_P, pairs)
    row = tl.load(rows_ptr + begin)
    begun = (tl.load(rows_ptr + begin - 1, mask=begin > 0, other=-1) != row).to(tl.int32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(begin, end):
        position = tl.load(order_ptr + i).to(tl.int32) // per_position  # a division of int64 is a function call
        acc += tl.load(dy_ptr + position.to(tl.int64) * stride_dy_t, mask=mask_d, other=0.0).to(tl.float32)
        following = tl.load(rows_ptr + i + 1, mask=i + 1 < pairs, other=-1)
        ends = following != row
        if ends & (begun == 1):
            tl.store(out_ptr + row * D + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)
        elif ends | (i + 1 == end):
            tl.store(parts_ptr + (chunk * 2 + begun) * D + offs_d, acc, mask=mask_d)
        acc = tl.where(ends, 0.0, acc)
        begun = tl.where(ends, 1, begun)
        row = following


@triton.jit
def byte_hash_embedding_bwd_join_kernel(
    rows_ptr, out_ptr, parts_ptr, pairs, D, steps, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """The sum of the run that begins in this chunk and goes on behind it, if there is one."""
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * BLOCK_P
    end = begin + BLOCK_P
    row = tl.load(rows_ptr + end - 1, mask=end < pairs, other=-1)
    goes_on = tl.load(rows_ptr + end, mask=end < pairs, other=-2) == row
    if goes_on & (tl.load(rows_ptr + begin - 1, mask=begin > 0, other=-1) != row):
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        acc = tl.load(parts_ptr + (chunk * 2 + 1) * D + offs_d, mask=mask_d, other=0.0)
        chunks = tl.cdiv(count_at_most(rows_ptr, pairs, row, steps).to(tl.int64), BLOCK_P)
        for first in range(chunk + 1, chunks, BLOCK_C):
            offs_c = first + tl.arange(0, BLOCK_C)
            mask = (offs_c < chunks)[:, None] & mask_d[None, :]
            acc += tl.sum(tl.load(parts_ptr + offs_c[:, None] * 2 * D + offs_d[None, :], mask=mask, other=0.0), 0)
        tl.store(out_ptr + row * D + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)


def _texts(cu_seqlens):
    """cu_seqlens, texts and the steps to find one; no cu_seqlens: every row is one text."""
    if cu_seqlens is None:
        return None, 1, 1
    return cu_seqlens.contiguous(), cu_seqlens.shape[0] - 1, cu_seqlens.shape[0].bit_length()


def byte_hash_ids_triton(tokens, group_sizes, num_functions, vocab, cu_seqlens):
    B, L = tokens.shape
    ids = tokens.new_empty(B, L, num_functions * len(group_sizes), dtype=torch.int64)
    if ids.numel():
        cu_seqlens, *texts = _texts(cu_seqlens)
        byte_hash_ids_kernel[(B * triton.cdiv(L, BLOCK_IDS),)](
            tokens, cu_seqlens, ids, L, num_functions, *texts, *tokens.stride(),
            PRIMES=PRIMES, SIZES=tuple(group_sizes), VOCAB=vocab, PACKED=cu_seqlens is not None, BLOCK_T=BLOCK_IDS,
        )
    return ids


def byte_hash_embedding_fwd_triton(tokens, table, byte_embedding, group_sizes, num_functions, vocab, cu_seqlens, sparse_grad):
    (B, L), D = tokens.shape, byte_embedding.shape[1]
    y = byte_embedding.new_empty(B, L, D)
    if y.numel() == 0:
        return y
    cu_seqlens, *texts = _texts(cu_seqlens)

    def run(BLOCK_T, BLOCK_D, **options):
        BLOCK_D = min(BLOCK_D, triton.next_power_of_2(D))
        byte_hash_embedding_fwd_kernel[B * triton.cdiv(L, BLOCK_T), triton.cdiv(D, BLOCK_D)](
            tokens, table, byte_embedding, cu_seqlens, y, L, D, num_functions, *texts, *tokens.stride(), *table.stride(), *byte_embedding.stride(),
            PRIMES=PRIMES, SIZES=tuple(group_sizes), VOCAB=vocab, PACKED=cu_seqlens is not None, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, **options,
        )

    FWD.launch(table, run, D=D)
    return y


def _sum_rows(dy, rows, order, per_position, out):
    """out[r] = the sum of dy[order[i] // per_position] over i with rows[i] == r; rows rise. Rows that don't occur are left alone."""
    pairs, D = rows.shape[0], dy.shape[1]

    def run(BLOCK_P, BLOCK_D, **options):
        BLOCK_D = min(BLOCK_D, triton.next_power_of_2(D))
        grid = triton.cdiv(pairs, BLOCK_P), triton.cdiv(D, BLOCK_D)
        parts = torch.empty(grid[0], 2, D, dtype=torch.float32, device=dy.device)
        blocks = dict(BLOCK_P=BLOCK_P, BLOCK_D=BLOCK_D)
        byte_hash_embedding_bwd_sums_kernel[grid](dy, rows, order, out, parts, pairs, D, per_position, *dy.stride(), **blocks, **options)
        byte_hash_embedding_bwd_join_kernel[grid](rows, out, parts, pairs, D, pairs.bit_length(), BLOCK_C=BLOCK_PARTS, **blocks, **options)

    if pairs:
        BWD.launch(dy, run)
    return out


def byte_hash_embedding_bwd_triton(
    dy, tokens, table_like, table_rows, byte_like, byte_rows, group_sizes, num_functions, vocab, cu_seqlens, sparse_grad, need_table, need_bytes,
):
    D = dy.shape[2]
    dy = dy.reshape(-1, D)
    dtable, dbytes, names = table_like.new_empty(0), byte_like.new_empty(0), tokens.new_empty(0, dtype=torch.int64)
    if need_bytes:
        rows, order = tokens.reshape(-1).long().sort(stable=True)
        dbytes = _sum_rows(dy, rows, order, 1, byte_like.new_zeros(byte_rows, D))
    if need_table:
        ids = byte_hash_ids_triton(tokens, group_sizes, num_functions, vocab, cu_seqlens)
        rows, order = ids.flatten().sort(stable=True)
        if sparse_grad:  # as many rows as occur: a shape that the host has to wait for
            names, rows = rows.unique_consecutive(return_inverse=True)
        out = table_like.new_empty(names.shape[0], D) if sparse_grad else table_like.new_zeros(table_rows, D)
        dtable = _sum_rows(dy, rows, order, ids.shape[2], out)
    return dtable, dbytes, names
