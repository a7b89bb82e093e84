"""Where patches begin, given entropies or tokens: see csrc/cpu/entropy_patch.cpp for the rules.

Layouts: entropies or tokens (B, L) in any strides; starts, ids and lengths (B, N), N = L or L + 1. One program walks one
row in blocks and carries two numbers from block to block: where the last patch began by the rule alone, and how many
patches there are. A maximum length then needs no state of its own: a position starts a patch where its distance from the
last start by the rule (a running maximum) is a multiple of it. A second kernel turns begins into lengths.
The rule that takes the largest entropies of each text is a stable sort of the keys (text, entropy falling) before that.
"""
import struct

import torch
import triton
import triton.language as tl

from . import configs
from .search import count_at_most

# PatchRule of csrc/common/params.h
THRESHOLD, MONOTONIC, COMBINED, TOP, BYTES, STATIC, SPACE = (tl.constexpr(number) for number in range(7))
CUT = configs.Table(
    "patch_cut",
    configs.Row({"BLOCK_L": 1024}, num_warps=16, arch=("gfx",)),  # more than one position a thread spills: masks lie in scalar registers
    configs.Row({"BLOCK_L": 1024}, num_warps=4, up_to={"N": 4096}),
    configs.Row({"BLOCK_L": 4096}, num_warps=16),
)
BLOCK_FLAT = 1024  # positions of a program that needs no neighbours
BLOCK_UPDATE = 256


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _live(valid_ptr, row, L, N, HAS_VALID: tl.constexpr):
    """The positions of a row that are no padding."""
    live = N
    if HAS_VALID:
        live = tl.load(valid_ptr + row) + (N - L)
    return live


@triton.jit
def _texts(cu_ptr, offs, texts, steps, PACKED: tl.constexpr):
    """The text of each position and where it begins."""
    text = tl.zeros_like(offs)
    begin = tl.zeros_like(offs)
    if PACKED:
        text = tl.minimum(count_at_most(cu_ptr, texts + 1, offs, steps) - 1, texts - 1)
        begin = tl.load(cu_ptr + text)
    return text, begin


@triton.jit
def _unsure(i, e, before, threshold, threshold_add, RULE: tl.constexpr):
    """Does position i >= 2 start a patch, given the entropy e at i - 1 and the one before it?"""
    if RULE == THRESHOLD:
        start = e > threshold
    elif RULE == MONOTONIC:
        start = (i == 2) | (e - before > threshold)
    else:
        start = (i == 2) | ((i != 3) & (e > threshold) & (e - before > threshold_add))
    return start


@triton.jit
def _space_like(byte):
    """No digit, no letter, and not inside a longer UTF-8 character. One comparison each: below 0 is far above as uint64."""
    digit = (byte - 48).to(tl.uint64) < 10
    letter = ((byte | 32) - 97).to(tl.uint64) < 26
    inside = (byte - 128).to(tl.uint64) < 64
    return (digit | letter | inside) == 0


@triton.jit
def _place(start, offs, live, last, count, max_length, LIMITED: tl.constexpr):
    """One block of starts by the rule -> starts, ids, and what the next block needs: the last start by the rule, patches so far."""
    marks = tl.where(start, offs, last)
    if LIMITED:
        start = live & ((offs - tl.associative_scan(marks, 0, _larger)) % max_length == 0)
    ones = start.to(tl.int32)
    return start, count + tl.cumsum(ones, 0) - 1, tl.max(marks, 0), count + tl.sum(ones, 0)


@triton.jit
def patch_cut_kernel(
    source_ptr, cu_ptr, valid_ptr, starts_ptr, ids_ptr, begins_ptr, counts_ptr, L, N, texts, steps,
    threshold, threshold_add, size, offset, max_length, stride_source_b, stride_source_l,
    RULE: tl.constexpr, LIMITED: tl.constexpr, PACKED: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source_ptr += row * stride_source_b
    starts_ptr += row * N
    ids_ptr += row * N
    begins_ptr += row * (N + 1)
    end = _live(valid_ptr, row, L, N, HAS_VALID)
    if RULE <= COMBINED:
        threshold = tl.full((), threshold, tl.float32).to(source_ptr.dtype.element_ty).to(tl.float32)  # as torch compares them
    last = -1
    count = 0
    for block in range(0, N, BLOCK_L):
        offs = block + tl.arange(0, BLOCK_L)
        live = offs < end
        _, begin = _texts(cu_ptr, offs, texts, steps, PACKED)
        i = offs - begin
        at = source_ptr + offs.to(tl.int64) * stride_source_l
        asked = live & (i >= 2)
        if RULE == BYTES:
            start = live
        elif RULE == STATIC:
            start = live & (i % size == 0)
        elif RULE == TOP:  # the source says which were taken
            start = live & ((i < 2) | (tl.load(at, mask=asked, other=0) != 0))
        elif RULE == SPACE:
            token = tl.load(at - stride_source_l, mask=asked, other=0).to(tl.int64) - offset
            before = tl.load(at - 2 * stride_source_l, mask=asked, other=0).to(tl.int64) - offset
            start = live & ((i < 2) | (token < 0) | (_space_like(token) & (_space_like(before) == 0)))
        else:
            e = tl.load(at - stride_source_l, mask=asked, other=0.0).to(tl.float32)
            before = tl.load(at - 2 * stride_source_l, mask=asked, other=0.0).to(tl.float32)
            start = live & ((i < 2) | _unsure(i, e, before, threshold, threshold_add, RULE))
        start, ids, last, count = _place(start, offs, live, last, count, max_length, LIMITED)
        tl.store(starts_ptr + offs, start, mask=offs < N)
        tl.store(ids_ptr + offs, tl.where(live, ids, -1), mask=offs < N)
        tl.store(begins_ptr + ids, offs, mask=start)
    tl.store(begins_ptr + count, end)
    tl.store(counts_ptr + row, count)


@triton.jit
def patch_lengths_kernel(begins_ptr, counts_ptr, lengths_ptr, N, BLOCK_L: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK_L)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    mask = offs < tl.load(counts_ptr + row)
    begins_ptr += row * (N + 1)
    begin = tl.load(begins_ptr + offs, mask=mask, other=0)
    end = tl.load(begins_ptr + offs + 1, mask=mask, other=0)
    tl.store(lengths_ptr + row * N + offs, end - begin, mask=offs < N)


@triton.jit
def patch_top_keys_kernel(
    entropies_ptr, cu_ptr, valid_ptr, keys_ptr, L, N, texts, steps, stride_entropies_b, stride_entropies_l,
    PACKED: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_L: tl.constexpr,
):
    """Keys that sort by text, within it by falling entropy, and then what cannot be taken; NaN is above everything, as in torch."""
    blocks = tl.cdiv(N, BLOCK_L)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    live = offs < _live(valid_ptr, row, L, N, HAS_VALID)
    text, begin = _texts(cu_ptr, offs, texts, steps, PACKED)
    asked = live & (offs - begin >= 2)
    at = entropies_ptr + row * stride_entropies_b + (offs.to(tl.int64) - 1) * stride_entropies_l
    e = tl.load(at, mask=asked, other=0.0).to(tl.float32)
    bits = tl.where(e == 0, 0.0, e).to(tl.int32, bitcast=True)  # one zero
    order = tl.where(e == e, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)  # rises with e
    falling = tl.where(asked, 0x7FFFFFFF - order.to(tl.int64), 1 << 32)
    tl.store(keys_ptr + row * N + offs, (tl.where(live, text, texts).to(tl.int64) << 33) + falling, mask=offs < N)


@triton.jit
def patch_top_take_kernel(
    order_ptr, cu_ptr, valid_ptr, taken_ptr, L, N, texts, steps, patch_size_bits,
    PACKED: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_L: tl.constexpr,
):
    """taken[order[k]]: is the k-th key among the first floor(length / patch_size) - 2 of its text?"""
    blocks = tl.cdiv(N, BLOCK_L)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    live = _live(valid_ptr, row, L, N, HAS_VALID)
    text, begin = _texts(cu_ptr, offs, texts, steps, PACKED)
    n = tl.zeros_like(offs) + live
    if PACKED:
        n = tl.load(cu_ptr + text + 1) - begin
    given = n - (N - L)
    # In float64, as the reference divides: a float argument would come as float32.
    patch_size = patch_size_bits.to(tl.float64, bitcast=True)
    wanted = tl.minimum(tl.floor(given.to(tl.float64) / patch_size).to(tl.int32) - 2, n - 2)
    taken = (offs < live) & (offs - begin < wanted)
    place = tl.load(order_ptr + row * N + offs, mask=offs < N, other=0)
    tl.store(taken_ptr + row * N + place, taken, mask=offs < N)


@triton.jit
def patcher_update_kernel(
    entropies_ptr, state_ptr, before_ptr, starts_ptr, ids_ptr, K, threshold, threshold_add, max_length, stride_entropies_b, stride_entropies_k,
    RULE: tl.constexpr, LIMITED: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One row; one warp, so that nothing is still reading the state when it is written."""
    row = tl.program_id(0).to(tl.int64)
    entropies_ptr += row * stride_entropies_b
    state_ptr += row * 3
    before_ptr += row
    dtype = before_ptr.dtype.element_ty
    threshold = tl.full((), threshold, tl.float32).to(dtype).to(tl.float32)
    seen = tl.load(state_ptr)
    carried = tl.load(before_ptr).to(tl.float32)
    last = -tl.load(state_ptr + 1).to(tl.int32)  # position 0 is the first of this block
    count = tl.load(state_ptr + 2) + 1
    for block in range(0, K, BLOCK_K):
        offs = block + tl.arange(0, BLOCK_K)
        live = offs < K
        at = entropies_ptr + offs.to(tl.int64) * stride_entropies_k
        e = tl.load(at, mask=live, other=0.0).to(dtype).to(tl.float32)
        before = tl.load(at - stride_entropies_k, mask=live & (offs > 0), other=0.0).to(dtype).to(tl.float32)
        before = tl.where(offs > 0, before, carried)
        i = seen + 1 + offs  # the position that this entropy decides
        start = live & ((i < 2) | _unsure(i, e, before, threshold, threshold_add, RULE))
        start, ids, last, count = _place(start, offs, live, last, count, max_length, LIMITED)
        tl.store(starts_ptr + row * K + offs, start, mask=live)
        tl.store(ids_ptr + row * K + offs, ids.to(tl.int32), mask=live)
    length = K - last
    if LIMITED:
        length = (length - 1) % max_length + 1
    tl.store(state_ptr, seen + K)
    tl.store(state_ptr + 1, length)
    tl.store(state_ptr + 2, count - 1)
    tl.store(before_ptr, tl.load(entropies_ptr + tl.cast(K - 1, tl.int64) * stride_entropies_k).to(dtype))


@triton.jit
def patch_ids_kernel(ends_ptr, ids_ptr, S, length, steps, BLOCK_L: tl.constexpr):
    """ids (B, length) = how many of the row's ends (B, S) lie at or before each position."""
    blocks = tl.cdiv(length, BLOCK_L)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    tl.store(ids_ptr + row * length + offs, count_at_most(ends_ptr + row * S, S, offs, steps), mask=offs < length)


def contiguous(tensor):
    return tensor if tensor is None else tensor.contiguous()


def _take_largest(entropies, patch_size, N, texts, options):
    """(B, N) bool: which positions follow one of the largest entropies of their text."""
    B, L = entropies.shape
    keys = torch.empty(B, N, dtype=torch.int64, device=entropies.device)
    taken = torch.empty(B, N, dtype=torch.bool, device=entropies.device)
    grid = (B * triton.cdiv(N, BLOCK_FLAT),)
    cu_seqlens, valid_lengths, *sizes = texts
    patch_top_keys_kernel[grid](entropies, cu_seqlens, valid_lengths, keys, L, N, *sizes, *entropies.stride(), **options, BLOCK_L=BLOCK_FLAT)
    order = keys.sort(dim=1, stable=True)[1]
    patch_size_bits = struct.unpack("<q", struct.pack("<d", patch_size))[0]
    patch_top_take_kernel[grid](order, cu_seqlens, valid_lengths, taken, L, N, *sizes, patch_size_bits, **options, BLOCK_L=BLOCK_FLAT)
    return taken


def patch_cut_triton(source, threshold, rule, threshold_add, patch_size, max_length, offset, cu_seqlens, valid_lengths, next):
    B, L = source.shape
    N = L + next
    starts = source.new_empty(B, N, dtype=torch.bool)
    ids, lengths = (source.new_empty(B, N, dtype=torch.int32) for _ in range(2))
    counts = source.new_empty(B, dtype=torch.int32)
    if B == 0:
        return starts, ids, lengths, counts
    cu_seqlens, valid_lengths = contiguous(cu_seqlens), contiguous(valid_lengths)
    num_texts = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    texts = cu_seqlens, valid_lengths, num_texts, (num_texts + 1).bit_length()
    options = dict(PACKED=cu_seqlens is not None, HAS_VALID=valid_lengths is not None)
    if rule == TOP.value:
        source = _take_largest(source, patch_size, N, texts, options)
    begins = torch.empty(B, N + 1, dtype=torch.int32, device=source.device)
    patch_cut_kernel[(B,)](
        source, *texts[:2], starts, ids, begins, counts, L, N, *texts[2:],
        threshold, threshold_add, int(min(patch_size, N)), offset, max_length, *source.stride(),
        RULE=rule, LIMITED=max_length > 0, **options, **CUT.pick(source, N=N),
    )
    patch_lengths_kernel[(B * triton.cdiv(N, BLOCK_FLAT),)](begins, counts, lengths, N, BLOCK_L=BLOCK_FLAT)
    return starts, ids, lengths, counts


def patcher_update_triton(entropies, state, before, threshold, rule, threshold_add, max_length):
    B, K = entropies.shape
    starts, ids = (entropies.new_empty(B, K, dtype=dtype) for dtype in (torch.bool, torch.int32))
    if B and K:
        patcher_update_kernel[(B,)](
            entropies, state, before, starts, ids, K, threshold, threshold_add, max_length, *entropies.stride(),
            RULE=rule, LIMITED=max_length > 0, BLOCK_K=min(BLOCK_UPDATE, triton.next_power_of_2(K)), num_warps=1,
        )
    return starts, ids


def patch_ids_triton(lengths, length):
    B, S = lengths.shape
    ids = lengths.new_empty(B, length, dtype=torch.int32)
    if B and length:
        ends = lengths[:, :-1].cumsum(1, dtype=torch.int64)  # the last patch takes what is left
        patch_ids_kernel[(B * triton.cdiv(length, BLOCK_FLAT),)](ends, ids, S - 1, length, (S - 1).bit_length(), BLOCK_L=BLOCK_FLAT)
    return ids
