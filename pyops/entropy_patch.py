"""Cutting byte texts into patches where a byte model is unsure. Source: the Byte Latent Transformer (facebookresearch/blt)."""
from typing import NamedTuple

import torch

from . import checks, dispatch, kernels
from .reference import entropy_patch as reference

OP, CUT, TOKENS, STATE, IDS = "entropy_patch", "patch_lengths_from_entropies", "patch_lengths_from_tokens", "PatcherState", "patch_ids_from_lengths"
dispatch.register(OP, OP, ("entropy_patch_fwd", "entropy_patch_bwd"), cpu=dispatch.cpu_dtypes, gpu=dispatch.gpu_dtypes)
dispatch.register(CUT, OP, ("patch_cut",), cpu=dispatch.cpu_dtypes, gpu=dispatch.gpu_dtypes)
dispatch.register(TOKENS, OP, ("patch_cut_tokens",), op="patch_cut", cpu=lambda tokens: None, gpu=lambda tokens: None)
dispatch.register(STATE, OP, ("patcher_update",), cpu=dispatch.cpu_dtypes, gpu=dispatch.gpu_dtypes)
dispatch.register(IDS, OP, ("patch_ids",), cpu=lambda lengths: None, gpu=lambda lengths: None)

RULES = {name: number for number, name in enumerate(("threshold", "monotonic", "combined", "top", "bytes", "static", "space"))}
MODES = ("space", "static", "bytes")


class Patches(NamedTuple):
    """How a batch is cut. N is L, or L + 1 with include_next; S_max the most patches of any row."""

    entropies: torch.Tensor  # (B, L) float32 (float64 for float64), nats; 0 on padding
    starts: torch.Tensor     # (B, N) bool: a patch starts here
    patch_ids: torch.Tensor  # (B, N) int32, from 0 and never falling; -1 on padding
    lengths: torch.Tensor    # (B, S_max) int32, zeros behind a row's last patch
    counts: torch.Tensor     # (B,) int32: patches of each row


def entropy_patch(logits, threshold, *, monotonic=False, max_patch_length=None, patch_size=None, cu_seqlens=None, valid_lengths=None,
                  threshold_add=None, include_next=False, max_patches=None, backend=None):
    """Entropy of every next-byte distribution, and the patches that it cuts a text into; one pass over the logits.

    A row's positions 0 and 1 always start a patch. Position i >= 2 does where the entropy H[i-1] of its byte says so:

    - threshold alone: H[i-1] > threshold.
    - monotonic: H[i-1] - H[i-2] > threshold; position 2 always.
    - threshold_add: H[i-1] > threshold and H[i-1] - H[i-2] > threshold_add; position 2 always and 3 never, as in
      facebookresearch/blt.
    - threshold None and patch_size: H[i-1] is among the L // patch_size - 2 largest; of equals the first.

    Args:
        logits: (B, L, V) float32, bfloat16, float16 or float64; L and V positive.
        threshold: nats, a finite number; None only with patch_size.
        monotonic, threshold_add: other rules than the plain threshold; they exclude each other.
        max_patch_length: None, or a patch that would grow past it ends there and the next one starts.
        patch_size: None, or the mean length to aim for when threshold is None, at least 1; need not be an integer.
        cu_seqlens: None, or (sequences + 1,) int32: the texts packed into a batch of 1. Ids count on through the row.
        valid_lengths: None, or (B,) int32: positions behind are padding.
        include_next: also decide whether the byte behind the last position starts a patch: N = L + 1 positions.
        max_patches: None, or the S_max to return, whatever the texts are; an error when a row has more.
        backend: "cpu", "reference", ... or None to choose.

    Returns:
        Patches. Rows, and packed texts, never see each other. Entropies are differentiable in logits; a distribution with
        NaN, +inf or nothing but -inf has entropy NaN, which starts no patch. A row of valid length 0 has no patches.
        Under torch.compile and on meta, without max_patches, lengths keep all N columns: their number would depend on the data.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendError: a forced backend cannot run.

    Equivalent to::

        H = torch.distributions.Categorical(logits=logits).entropy()
        starts = torch.cat([torch.ones(B, 2, dtype=bool), H[:, 1:-1] > threshold], 1)
        patch_ids = starts.cumsum(1) - 1
    """
    checks.check_tensor(OP, "logits", logits, 3, "(B, L, V)")
    B, L, V = logits.shape
    checks.check_positive(OP, L=L, V=V)
    rule = _check_rule(OP, threshold, monotonic, threshold_add, patch_size)
    valid_lengths = _check_texts(OP, B, L, logits, max_patch_length, cu_seqlens, valid_lengths, include_next, max_patches)
    chosen, _ = dispatch.pick(OP, logits, backend=backend)
    numbers = (float(threshold or 0), float(threshold_add or 0), patch_size or 1)
    if chosen != "reference":
        entropies, *cut = kernels.ops(chosen).entropy_patch_fwd(logits, numbers[0], RULES[rule], *numbers[1:], max_patch_length or 0, cu_seqlens,
                                                               valid_lengths, bool(include_next))
    else:
        dispatch.count(OP, chosen)
        entropies = reference.entropy(logits, valid_lengths)
        cut = reference.cut(entropies.detach(), rule, *numbers, max_patch_length, 0, cu_seqlens, valid_lengths, bool(include_next))
    return _patches(OP, entropies, cut, max_patches)


def patches_from_entropies(entropies, threshold, *, monotonic=False, max_patch_length=None, patch_size=None, cu_seqlens=None, valid_lengths=None,
                           threshold_add=None, include_next=False, max_patches=None, backend=None):
    """The patches of `entropy_patch` from entropies (B, L) that are known already; the same rules, arguments and errors.

    Returns: Patches, holding the entropies that came. Not differentiable.
    """
    checks.check_tensor(CUT, "entropies", entropies, 2, "(B, L)")
    B, L = entropies.shape
    checks.check_positive(CUT, L=L)
    rule = _check_rule(CUT, threshold, monotonic, threshold_add, patch_size)
    valid_lengths = _check_texts(CUT, B, L, entropies, max_patch_length, cu_seqlens, valid_lengths, include_next, max_patches)
    chosen, _ = dispatch.pick(CUT, entropies, backend=backend)
    cut = _cut(CUT, chosen, entropies.detach(), rule, (float(threshold or 0), float(threshold_add or 0), patch_size or 1), max_patch_length, 0, cu_seqlens,
               valid_lengths, include_next)
    return _patches(CUT, entropies, cut, max_patches)


def patch_lengths_from_entropies(entropies, threshold, **options):
    """Lengths (B, S_max) int32 of the patches of `patches_from_entropies`, whose arguments these are; zeros behind a row's last."""
    return patches_from_entropies(entropies, threshold, **options).lengths


def patch_lengths_from_tokens(tokens, mode, *, patch_size=None, offset=4, max_patch_length=None, cu_seqlens=None, valid_lengths=None,
                              include_next=False, max_patches=None, backend=None):
    """Lengths of patches that the bytes themselves decide.

    Args:
        tokens: (B, L) int64 or int32; token `offset` is byte 0, smaller ones are special (BLT: 4).
        mode: "space": positions 0 and 1, and each position behind the first of a run of space-like bytes (ASCII that is no
            letter or digit, or the first byte of a longer UTF-8 character), or behind a special token.
            "static": every patch_size positions. "bytes": every position.
        The rest as in `entropy_patch`.

    Returns:
        (B, S_max) int32, zeros behind a row's last patch. `patch_ids_from_lengths` gives ids.
    """
    if mode not in MODES:
        checks.fail(TOKENS, f"mode must be one of {', '.join(MODES)}, got {mode!r}; entropies go to patch_lengths_from_entropies")
    checks.check_tensor(TOKENS, "tokens", tokens, 2, "(B, L)", dtypes=(torch.int64, torch.int32))
    B, L = tokens.shape
    checks.check_positive(TOKENS, L=L)
    if (patch_size is not None) != (mode == "static"):
        checks.fail(TOKENS, f"patch_size goes with mode 'static', and only with it, got {patch_size!r} with {mode!r}")
    if mode == "static":
        _check_integer(TOKENS, "patch_size", patch_size, 1)
    _check_integer(TOKENS, "offset", offset, 0)
    valid_lengths = _check_texts(TOKENS, B, L, tokens, max_patch_length, cu_seqlens, valid_lengths, include_next, max_patches)
    chosen, _ = dispatch.pick(TOKENS, tokens, backend=backend)
    cut = _cut(TOKENS, chosen, tokens, mode, (0.0, 0.0, patch_size or 1), max_patch_length, offset, cu_seqlens, valid_lengths, include_next)
    return _patches(TOKENS, tokens, cut, max_patches).lengths


def patch_ids_from_lengths(lengths, length, *, exact=True, backend=None):
    """The patch of every position, in time linear in the positions.

    Args:
        lengths: (B, S) int32 or int64, not negative; patches of length 0 are skipped.
        length: positions of a row.
        exact: True: every row of lengths must sum to `length`. False: as transformers' BLT reads lengths: the last patch of
            a row ends at `length` wherever the others end, its own length is not read.

    Returns:
        (B, length) int32. Equivalent to: ``(begins[:, None] <= torch.arange(length)[None, :, None]).sum(-1) - 1``
    """
    checks.check_tensor(IDS, "lengths", lengths, 2, "(B, S)", dtypes=(torch.int32, torch.int64))
    _check_integer(IDS, "length", length, 0)
    checks.check_flags(IDS, exact=exact)
    if length:
        checks.check_positive(IDS, S=lengths.shape[1])
    if checks.has_values(lengths):
        checks.check_not_negative(IDS, "lengths", lengths if exact else lengths[:, :-1])
        if exact and bool((lengths.sum(1) != length).any()):
            checks.fail(IDS, f"lengths of every row must sum to {length}, got {lengths.sum(1).tolist()}; exact=False lets the last patch take the rest")
    chosen, _ = dispatch.pick(IDS, lengths, backend=backend)
    if chosen != "reference":
        return kernels.ops(chosen).patch_ids(lengths, length)
    dispatch.count(IDS, chosen)
    return reference.patch_ids(lengths, length)


def split_patch_lengths(lengths, max_patch_length):
    """Lengths with every patch cut into pieces of at most max_patch_length, the rest last.

    Args:
        lengths: (B, S) int32 or int64; those that are not positive are dropped.
        max_patch_length: a positive integer, or None: lengths as they are.

    Returns: (B, S') in lengths' dtype, zeros behind a row's last piece. Equivalent to: transformers' process_patch_lengths.
    """
    fn = "split_patch_lengths"
    checks.check_tensor(fn, "lengths", lengths, 2, "(B, S)", dtypes=(torch.int32, torch.int64))
    if max_patch_length is None:
        return lengths
    _check_integer(fn, "max_patch_length", max_patch_length, 1)
    B, dtype, lengths = lengths.shape[0], lengths.dtype, lengths.long()
    pieces = (lengths.clamp(min=0) + max_patch_length - 1) // max_patch_length
    per_row = pieces.sum(1)
    width = int(per_row.max()) if lengths.numel() else 0
    patch = torch.repeat_interleave(pieces.flatten())            # which patch each piece is of
    end = pieces.flatten().cumsum(0)
    last = torch.arange(patch.shape[0], device=lengths.device) == end[patch] - 1
    rest = lengths.flatten() - (pieces.flatten() - 1) * max_patch_length
    column = torch.arange(patch.shape[0], device=lengths.device) - (per_row.cumsum(0) - per_row)[patch // max(lengths.shape[1], 1)]
    split = lengths.new_zeros(B, width)
    split[patch // max(lengths.shape[1], 1), column] = torch.where(last, rest[patch], max_patch_length)
    return split.to(dtype)


def hf_patch_lengths(entropies, threshold, max_patch_length=None, *, backend=None):
    """Lengths exactly as transformers' BltPatcher gives them, quirks included; for the plain threshold.

    transformers also decides whether the byte behind the last starts a patch, yet counts L positions: a row with the most
    patches may end in a patch of length 0; every other row has one more on its last patch, zeros, and -1 in the last
    column, so that it still sums to L. Those are the lengths over L + 1 positions, less one in the last column.
    With max_patch_length transformers drops what is not positive before it splits.

    Args: entropies (B, L) and threshold as in `entropy_patch`. Returns: (B, S_max) int64.
    """
    lengths = patch_lengths_from_entropies(entropies, threshold, include_next=True, backend=backend).long()
    lengths[:, -1] -= 1
    return split_patch_lengths(lengths, max_patch_length)


class PatcherState:
    """Patches of texts that arrive a byte or a block at a time, with the boundaries of the whole text at once.

    Args:
        batch: rows. threshold, monotonic, threshold_add, max_patch_length: as in `entropy_patch`.
        dtype: the entropies'; torch.float32, or what `patches_from_entropies` would be given.

    Byte 0 of every row starts patch 0 unasked. `update(entropies)` takes the entropies (B, K) of the next K positions and
    answers for the byte behind each: starts (B, K) bool and patch_ids (B, K) int32. So starts of all calls one after the
    other, behind a True, are `starts` of patches_from_entropies(..., include_next=True). `update_from_logits` takes logits
    (B, K, V). `patch_id`, `patch_length` and `position` (B,) tell of the open patch and of how many entropies came.
    """

    def __init__(self, batch, threshold, *, monotonic=False, threshold_add=None, max_patch_length=None, dtype=torch.float32, device="cpu", backend=None):
        _check_integer(STATE, "batch", batch, 0)
        if threshold is None:
            checks.fail(STATE, "threshold is missing; patch_size needs the whole text: call patches_from_entropies", TypeError)
        if dtype not in checks.FLOATS:
            checks.fail(STATE, f"dtype must be float32, bfloat16, float16 or float64, got {dtype}", TypeError)
        self.rule = _check_rule(STATE, threshold, monotonic, threshold_add, None)
        _check_optional_integer(STATE, "max_patch_length", max_patch_length)
        self.threshold, self.threshold_add, self.max_patch_length = float(threshold), float(threshold_add or 0), max_patch_length
        self.backend = backend
        self.before = torch.zeros(batch, dtype=dtype, device=device)
        self.state = torch.tensor([0, 1, 0], device=device).repeat(batch, 1)  # entropies seen; length and id of the open patch

    @property
    def position(self):
        return self.state[:, 0]

    @property
    def patch_length(self):
        return self.state[:, 1]

    @property
    def patch_id(self):
        return self.state[:, 2]

    def update(self, entropies, lengths=None):
        """entropies (B, K), or (B,) for one position -> starts, patch_ids of the same shape.

        lengths: (B,) int64, how many of the K positions are the row's own, or None: all; behind them starts are False and ids -1.
        """
        if isinstance(entropies, torch.Tensor) and entropies.dim() == 1:
            return tuple(t[:, 0] for t in self.update(entropies[:, None], lengths))
        checks.check_tensor(STATE, "entropies", entropies, 2, "(B, K) or (B,)", self.before)
        checks.check_shape(STATE, "entropies", entropies, (self.before.shape[0], None), "(B, K)")
        chosen, _ = dispatch.pick(STATE, entropies, self.before, backend=self.backend)
        entropies = entropies.detach()
        if lengths is not None:
            return self._update_some(entropies, lengths)
        if chosen != "reference":
            return kernels.ops(chosen).patcher_update(entropies, self.state, self.before, self.threshold, RULES[self.rule], self.threshold_add,
                                                     self.max_patch_length or 0)
        dispatch.count(STATE, chosen)
        return reference.update(entropies, self.state, self.before, self.rule, self.threshold, self.threshold_add, self.max_patch_length)

    def _update_some(self, entropies, lengths):
        """`update` of rows of unequal length: of all K positions, and then back to where each row ends."""
        K = entropies.shape[1]
        checks.check_optional(STATE, "lengths", lengths, (entropies.shape[0],), "(B,)", entropies, dtypes=(torch.int64, torch.int32))
        if checks.has_values(lengths) and lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= K:
            checks.fail(STATE, f"lengths must be 0 to {K}, the positions that came, got {int(lengths.min())} to {int(lengths.max())}")
        state, before, lengths = self.state.clone(), self.before.clone(), lengths.long()
        starts, ids = self.update(entropies)
        position = torch.arange(K, device=entropies.device)
        own = position < lengths[:, None]
        starts, ids = starts & own, torch.where(own, ids, -1)
        if K == 0:
            return starts, ids
        last, came = (lengths - 1).clamp(min=0)[:, None], lengths > 0
        start = torch.where(starts, position, -1).amax(1)
        self.state = torch.stack([state[:, 0] + lengths, torch.where(start < 0, state[:, 1] + lengths, lengths - start),
                                  torch.where(came, ids.gather(1, last)[:, 0].long(), state[:, 2])], 1)  # fmt: skip
        self.before = torch.where(came, entropies.gather(1, last)[:, 0].to(before.dtype), before)
        return starts, ids

    def reorder(self, rows):
        """Row i becomes what row rows[i] was."""
        self.state, self.before = self.state[rows], self.before[rows]

    def update_from_logits(self, logits):
        """logits (B, K, V), or (B, V) for one position -> starts, patch_ids, entropies, of the shape without V."""
        if isinstance(logits, torch.Tensor) and logits.dim() == 2:
            return tuple(t[:, 0] for t in self.update_from_logits(logits[:, None]))
        with torch.no_grad():
            entropies = entropy_patch(logits, self.threshold, backend=self.backend).entropies
        return *self.update(entropies), entropies


def _cut(fn, chosen, source, rule, numbers, max_patch_length, offset, cu_seqlens, valid_lengths, include_next):
    if chosen != "reference":
        return kernels.ops(chosen).patch_cut(source, numbers[0], RULES[rule], *numbers[1:], max_patch_length or 0, offset, cu_seqlens, valid_lengths,
                                            bool(include_next))
    dispatch.count(fn, chosen)
    return reference.cut(source, rule, *numbers, max_patch_length, offset, cu_seqlens, valid_lengths, bool(include_next))


def _patches(fn, entropies, cut, max_patches):
    """Patches with lengths as wide as the most patches of a row, or as wide as was asked for."""
    starts, ids, lengths, counts = cut
    width = max_patches
    every = counts.full_tensor() if checks.is_spread(counts) else counts  # rows on several ranks are as wide on all
    if checks.has_values(every) or (width is None and not torch.compiler.is_compiling() and not every.is_meta):
        most = every.item() if every.shape[0] == 1 else int(every.max()) if every.shape[0] else 0
        if width is not None and most > width:
            checks.fail(fn, f"max_patches must be at least {most}, the most patches of a row, got {width}")
        width = most if width is None else width
    if width is not None:
        lengths = lengths.narrow(1, 0, width) if width <= lengths.shape[1] else torch.nn.functional.pad(lengths, (0, width - lengths.shape[1]))
    return Patches(entropies, starts, ids, lengths, counts)


def _check_rule(fn, threshold, monotonic, threshold_add, patch_size):
    """The name of the rule that these arguments ask for."""
    checks.check_flags(fn, monotonic=monotonic)
    if threshold is None:
        if patch_size is None:
            checks.fail(fn, "threshold must be a number of nats; None needs patch_size, the mean length to aim for")
        if monotonic or threshold_add is not None:
            checks.fail(fn, "monotonic and threshold_add need a threshold, got None")
    for name, value in (("threshold", threshold), ("threshold_add", threshold_add), ("patch_size", patch_size)):
        if value is not None:
            checks.check_number(fn, name, value, finite=True)
    if patch_size is not None and patch_size < 1:
        checks.fail(fn, f"patch_size must be at least 1, got {patch_size!r}")
    if monotonic and threshold_add is not None:
        checks.fail(fn, "monotonic and threshold_add exclude each other: threshold_add alone is the combined rule")
    if threshold is None:
        return "top"
    return "monotonic" if monotonic else "threshold" if threshold_add is None else "combined"


def _check_texts(fn, B, L, like, max_patch_length, cu_seqlens, valid_lengths, include_next, max_patches):
    """valid_lengths as the kernels read them, without gaps."""
    _check_optional_integer(fn, "max_patch_length", max_patch_length)
    _check_optional_integer(fn, "max_patches", max_patches)
    checks.check_flags(fn, include_next=include_next)
    if cu_seqlens is not None and (valid_lengths is not None or include_next):
        checks.fail(fn, "cu_seqlens excludes valid_lengths and include_next: packed texts have no room behind them")
    checks.check_cu_seqlens(fn, cu_seqlens, B, L, like)
    checks.check_optional(fn, "valid_lengths", valid_lengths, (B,), "(B,)", like, dtypes=(torch.int32,))
    if valid_lengths is not None and B and checks.has_values(valid_lengths):
        low, high = (int(v) for v in valid_lengths.aminmax())
        if low < 0 or high > L:
            checks.fail(fn, f"valid_lengths must be 0 to {L}, the number of positions, got {low} to {high}")
    return None if valid_lengths is None else valid_lengths.contiguous()


def _check_integer(fn, name, value, low):
    if isinstance(value, torch.SymInt):
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < low or value >= 2**31:
        checks.fail(fn, f"{name} must be an integer from {low}, got {value!r}")


def _check_optional_integer(fn, name, value):
    if value is not None:
        _check_integer(fn, name, value, 1)


# ---- shapes and gradients of the native ops ----------------------------------------------------------------


def _fake_cut(like, B, N):
    ids = like.new_empty((B, N), dtype=torch.int32)
    return like.new_empty((B, N), dtype=torch.bool), ids, torch.empty_like(ids), like.new_empty(B, dtype=torch.int32)


@kernels.register_fake("entropy_patch_fwd")
def _(logits, threshold, rule, threshold_add, patch_size, max_length, cu_seqlens, valid_lengths, next):
    B, L = logits.shape[:2]
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((B, L), dtype=acc), *_fake_cut(logits, B, L + next)


@kernels.register_fake("entropy_patch_bwd")
def _(dentropies, logits, valid_lengths):
    return logits.new_empty(logits.shape)


@kernels.register_fake("patch_cut")
def _(source, threshold, rule, threshold_add, patch_size, max_length, offset, cu_seqlens, valid_lengths, next):
    return _fake_cut(source, source.shape[0], source.shape[1] + next)


@kernels.register_fake("patcher_update")
def _(entropies, state, before, threshold, rule, threshold_add, max_length):
    return entropies.new_empty(entropies.shape, dtype=torch.bool), entropies.new_empty(entropies.shape, dtype=torch.int32)


@kernels.register_fake("patch_ids")
def _(lengths, length):
    return lengths.new_empty((lengths.shape[0], length), dtype=torch.int32)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[7])


def _backward(ops, ctx, dentropies, *integers):
    return ops.entropy_patch_bwd(dentropies, *ctx.saved_tensors), *[None] * 8


kernels.register_autograd(OP, _backward, _setup_context)
