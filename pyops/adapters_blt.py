"""What terrazzo.patch puts in the place of the functions and methods of transformers' BLT: the same parameters, no masks.

transformers builds its masks in BltModel.forward and BltPatcher.forward and hands them down to every attention. Here the
functions that would build them return what a mask stands for, an UnbuiltMask, and the attention reads that. As in
adapters.py, each factory takes what it replaces and the backend asked for, and leaves to transformers what no native backend serves.
"""
import functools
import math

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from . import dispatch
from .adapters import plain_tensors, serving
from .byte_hash_embedding import byte_hash_embedding
from .entropy_patch import hf_patch_lengths, patch_ids_from_lengths
from .local_attention import local_attention
from .patch_cross_attention import patch_cross_attention
from .patch_reduce import patch_reduce

class UnbuiltMask:
    """A mask known by what it means. It is built, by transformers' function, only where other code looks into it.

    That code (an attention that was left alone, a user's own) meets a tensor: attributes, indexing and torch functions
    work on the built mask.
    """

    def __init__(self, build):
        self._build, self._mask = build, None

    def built(self):
        if self._mask is None:
            self._mask = self._build()
        return self._mask

    def __getattr__(self, name):  # only for what is not set in __init__
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.built(), name)

    def __getitem__(self, index):
        return self.built()[index]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(UnbuiltMask, UnbuiltMask.built, (args, kwargs or {}))
        return function(*args, **kwargs)


class WindowMask(UnbuiltMask):
    """Each byte sees itself and the window - 1 before it, those of key_mask (B, L) aside."""

    def __init__(self, build, window, key_mask):
        super().__init__(build)
        self.window, self.key_mask = window, key_mask


class PatchMask(UnbuiltMask):
    """Patches and bytes see each other where they belong together."""

    def __init__(self, build, patch_ids, num_patches, patches_as_queries, k_per_patch):
        super().__init__(build)
        self.patch_ids, self.num_patches, self.k_per_patch = patch_ids, num_patches, k_per_patch
        self.queries = "patches" if patches_as_queries else "bytes"


def blt_window(original, backend):
    def terrazzo_sliding_window_causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **options):
        build = functools.partial(original, config, inputs_embeds, attention_mask, past_key_values, position_ids, **options)
        if options or past_key_values is not None or not _is_plain_window(config, inputs_embeds, attention_mask, position_ids):
            return build()
        chosen, _ = serving("local_attention", inputs_embeds, backend=backend)
        if chosen is None:
            return build()
        key_mask = None if attention_mask is None else attention_mask.bool()
        return WindowMask(functools.partial(build, allow_is_causal_skip=False), config.sliding_window, key_mask)

    return terrazzo_sliding_window_causal_mask


def _is_plain_window(config, inputs_embeds, attention_mask, position_ids):
    """Whether the mask is a causal window and perhaps padding: nothing packed, nothing made by hand."""
    if config._attn_implementation not in OURS or not config.sliding_window or not getattr(config, "is_causal", True):
        return False
    if attention_mask is None:  # transformers then takes position_ids that start again for packed texts
        return position_ids is None or not bool((position_ids.diff(dim=-1) != 1).any())
    if attention_mask.shape != inputs_embeds.shape[:2]:
        return False
    # A byte that sees nothing averages every value in "eager", and gets zeros in "sdpa" and here.
    return config._attn_implementation == "sdpa" or not _some_see_nothing(attention_mask.bool(), config.sliding_window)


def _some_see_nothing(key_mask, window):
    position = torch.arange(key_mask.shape[1], device=key_mask.device)
    last_seen = torch.where(key_mask, position, -window).cummax(1)[0]
    return bool((position - last_seen >= window).any())


def blt_patch_mask(original, backend):
    def terrazzo_patch_cross_attention_mask(patch_ids, num_patches, sequence_length, patches_as_queries=False, cross_attn_k=1, dtype=torch.float32):
        build = functools.partial(original, patch_ids, num_patches, sequence_length, patches_as_queries, cross_attn_k, dtype)
        chosen, _ = serving("patch_cross_attention", torch.empty(0, dtype=dtype, device=patch_ids.device), backend=backend)
        return build() if chosen is None else PatchMask(build, patch_ids, num_patches, patches_as_queries, cross_attn_k)

    return terrazzo_patch_cross_attention_mask


OURS = ("eager", "sdpa")  # the attention implementations that compute what terrazzo's attention does


def _stays(module):
    """Whether this call of an attention has to be transformers' own: dropout, another implementation, weights to be returned."""
    implementation = module.config._attn_implementation
    if implementation not in OURS or (module.training and module.dropout):
        return True
    return implementation == "eager" and _collects_weights()


def _collects_weights():
    """Whether transformers is collecting attention weights, which only its eager attention computes."""
    try:
        from transformers.utils.output_capturing import _active_collector as collector
    except ImportError:  # a later transformers collects them otherwise
        return True
    return any(name.endswith("attentions") for name in collector.get() or ())


def _built(mask):
    return mask.built() if isinstance(mask, UnbuiltMask) else mask


def _heads(projection, x, width):
    return projection(x).view(*x.shape[:2], -1, width)


def blt_self_attention(original, backend):
    from transformers.models.blt.modeling_blt import apply_rotary_pos_emb

    def forward(self, hidden_states, attention_mask, position_embeddings, past_key_values=None, **kwargs):
        mask, chosen = attention_mask, None
        if isinstance(mask, WindowMask) and past_key_values is None and not _stays(self):
            chosen, _ = serving("local_attention", hidden_states, backend=backend)
        if chosen is None:
            return original(self, hidden_states, _built(mask), position_embeddings, past_key_values=past_key_values, **kwargs)
        q, k, v = (_heads(projection, hidden_states, self.head_dim) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        y = local_attention(q, k, v, mask.window, scale=self.scaling, key_mask=mask.key_mask, backend=chosen)
        return self.o_proj(y.flatten(2)), None

    return forward


def blt_cross_attention(original, backend):
    def forward(self, hidden_states, cross_attention_states=None, attention_mask=None, **kwargs):
        mask, chosen = attention_mask, None
        if isinstance(mask, PatchMask) and not _stays(self):
            chosen, _ = serving("patch_cross_attention", hidden_states, backend=backend)
        if chosen is None:
            return original(self, hidden_states, cross_attention_states, _built(mask), **kwargs)
        states = self.k_norm(cross_attention_states)
        q = _heads(self.q_proj, self.q_norm(hidden_states), self.head_dim)
        k, v = (_heads(projection, states, self.head_dim) for projection in (self.k_proj, self.v_proj))
        y = patch_cross_attention(q, k, v, mask.patch_ids, queries=mask.queries, k_per_patch=mask.k_per_patch, scale=self.scaling,
                                  num_patches=mask.num_patches, backend=chosen)
        if mask.queries == "patches":
            y = _with_averages(y, q, k, v, mask, self.scaling)
        return self.o_proj(y.flatten(2)) + hidden_states, None  # the callers add hidden_states once more

    return forward


def _with_averages(y, q, k, v, mask, scale):
    """y with the average of all values in the rows of patches without bytes, as transformers' mask of large numbers has it.

    Rows of a batch have such patches behind their last, and the last byte may read one. Softmax weights that are all alike have
    the gradient of `scores`, which is linear in q and k, and so costs one small matrix for each head.
    """
    empty = torch.ones_like(mask.patch_ids[:, :1], dtype=torch.bool).repeat(1, mask.num_patches).scatter(1, mask.patch_ids, False)
    if not torch.compiler.is_compiling() and not empty.any():
        return y
    average = v.mean(1, keepdim=True)
    group = q.shape[2] // k.shape[2]
    rows = average.repeat_interleave(group, 2)
    if dispatch.needs_grad(q, k):
        spread = torch.einsum("blhp,blhr->bhpr", k - k.mean(1, keepdim=True), (v - average).detach()) * (scale / k.shape[1])
        scores = torch.einsum("bshgp,bhpr->bshgr", q.unflatten(2, (-1, group)), spread).flatten(2, 3)
        rows = rows + (scores - scores.detach())
    return torch.where(empty.repeat_interleave(mask.k_per_patch, 1)[:, :, None, None], rows, y)


def blt_hash_embeddings(original, backend):
    def terrazzo_compute_hash_embeddings(local_encoder_tokens, local_encoder, encoder_hash_tok_embedding, encoder_hash_byte_group_nb_functions,
                                         encoder_hash_byte_group_size, encoder_hash_byte_group_vocab):
        embed, table = local_encoder.embed_tokens, encoder_hash_tok_embedding
        hashing = (encoder_hash_byte_group_size, encoder_hash_byte_group_nb_functions, encoder_hash_byte_group_vocab)
        chosen = None
        if _is_plain_embedding(embed) and _is_plain_embedding(table) and embed.weight.dtype == table.weight.dtype and not embed.sparse:
            chosen, _ = serving("byte_hash_embedding", local_encoder_tokens, table.weight, embed.weight, backend=backend)
        if chosen is None:
            return original(local_encoder_tokens, local_encoder, table, hashing[1], hashing[0], hashing[2])
        return byte_hash_embedding(local_encoder_tokens, table.weight, embed.weight, *hashing, sparse_grad=table.sparse, backend=chosen)

    return terrazzo_compute_hash_embeddings


def _is_plain_embedding(module):
    """Whether a call of the module is a look-up of its weight and nothing else: no adapter, hook, renormalisation or frozen row."""
    if type(module) is not nn.Embedding or module._forward_hooks or module._forward_pre_hooks or not plain_tensors(module.weight):
        return False
    return module.max_norm is None and module.padding_idx is None and not module.scale_grad_by_freq


def blt_patch_lengths(original, backend):
    @torch.compiler.disable  # how many patches there are depends on the data: a graph would have to make room for one a byte
    def patch_lengths_from_entropies(entropies, sequence_length, patch_size=None, threshold=None):
        chosen = None
        if entropies.shape[1] == sequence_length > 0 and isinstance(threshold, (int, float)) and math.isfinite(threshold):
            chosen, _ = serving("patch_lengths_from_entropies", entropies, backend=backend)
        if chosen is None:
            return original(entropies, sequence_length, patch_size, threshold)
        return hf_patch_lengths(entropies, threshold, backend=chosen)

    return patch_lengths_from_entropies


def blt_patch_ids(original, backend):
    def _patch_ids_from_lengths(self, patch_lengths, seq_len):
        chosen = None
        if _are_lengths(patch_lengths):
            chosen, _ = serving("patch_ids_from_lengths", patch_lengths, backend=backend)
        if chosen is None:
            return original(self, patch_lengths, seq_len)
        return patch_ids_from_lengths(patch_lengths, seq_len, exact=False, backend=chosen).long()  # what transformers indexes with

    return _patch_ids_from_lengths


def _are_lengths(lengths):
    """transformers counts in floating point where it is told no patch_size, and may be given any lengths by hand."""
    if lengths.dtype not in (torch.int32, torch.int64) or lengths.shape[1] == 0:
        return False
    return torch.compiler.is_compiling() or not bool((lengths[:, :-1] < 0).any())


def blt_patch_reduce(original, backend):
    def terrazzo_patch_reduce(self, hidden_states, max_num_patches, patch_ids):
        chosen, _ = serving("patch_reduce", hidden_states, backend=backend)
        if chosen is None:
            return original(self, hidden_states, max_num_patches, patch_ids)
        return patch_reduce(hidden_states, patch_ids, max_num_patches, backend=chosen)

    return terrazzo_patch_reduce


# ---- the cache -------------------------------------------------------------------------------------------------

NO_CACHE = (
    "transformers' cache for BLT fails on its own config, and decodes wrong bytes where it runs (hashes, patches and cross-attention see the new "
    "byte alone)"
)


def _say_uncached():
    dispatch.warn_once("terrazzo.patch: %s; the patched model computes without it, as with use_cache=False", NO_CACHE)


def _refuse_cache(cache):
    if cache is not None:
        raise ValueError(
            f"terrazzo.patch: past_key_values must be None, got {type(cache).__name__}: {NO_CACHE}; pass the whole text each time, as generate() does"
        )


def blt_uncached(original, backend):
    @functools.wraps(original)
    def forward(self, input_ids=None, patch_lengths=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                use_cache=None, **kwargs):
        _refuse_cache(past_key_values)
        if use_cache or (use_cache is None and self.config.use_cache):
            _say_uncached()
        return original(self, input_ids=input_ids, patch_lengths=patch_lengths, attention_mask=attention_mask, position_ids=position_ids,
                        inputs_embeds=inputs_embeds, use_cache=False, **kwargs)

    return forward


def blt_generate(original, backend):
    @functools.wraps(original)
    def generate(self, *args, **kwargs):
        _refuse_cache(kwargs.get("past_key_values"))
        if kwargs.get("use_cache", True):
            _say_uncached()
        return original(self, *args, **kwargs | dict(use_cache=False))

    return generate
