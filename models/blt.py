"""BLT, the Byte Latent Transformer: a large model over patches of bytes between two small ones over bytes (Pagnoni et al. 2024).

Symbols: B batch, L bytes, S patches, k cross_attn_k. A patcher's entropies cut the text; the encoder turns each patch into k vectors,
the global model runs over patches, the decoder's bytes ask the last patch that had closed. Tensor names are transformers'.
"""
import torch
import torch.nn.functional as F
from torch import nn

import terrazzo

from ..entropy_patch import PatcherState, patch_ids_from_lengths, patches_from_entropies
from . import layers, loading, steps
from .blt_config import FN, BltConfig
from .byte_layers import Projections, Stack, dense_attention
from .entropy_model import EntropyModel
from .generation import CausalGeneration


class CrossAttention(Projections):
    """Patches ask their bytes, or bytes ask a patch; gives x twice and what was heard, as transformers' layers and their callers add it."""

    def __init__(self, config):
        super().__init__(config)
        self.q_norm, self.k_norm = (layers.RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))

    def keys_values(self, states):
        return tuple(map(self.heads, steps.normed(states, self.k_norm, self.k_proj, self.v_proj)))

    def forward(self, x, keys_values, patch_ids, num_patches, k, queries):
        q = self.heads(*steps.normed(x, self.q_norm, self.q_proj))
        if self.training and self.dropout:
            patches = torch.arange(num_patches, device=x.device).repeat_interleave(k)
            mask = patches[:, None] == patch_ids[:, None] if queries == "patches" else patch_ids[:, :, None] == patches
            heard = dense_attention(q, *keys_values, mask[:, None], self.dropout).nan_to_num(0.0)  # of an empty patch
        else:
            heard = terrazzo.patch_cross_attention(q, *keys_values, patch_ids, queries=queries, k_per_patch=k, num_patches=num_patches)
        return steps.added(2 * x, heard.flatten(2), self.o_proj)


class Local(Stack):
    """Layers over bytes, with cross-attention in the last of them or in all."""

    def __init__(self, config, part, width):
        super().__init__(part, config.local_attention_window_len)
        self.k, self.dropout = config.cross_attn_k, part.dropout
        self.patch_embedding_projection = layers.Linear(width, part.hidden_size * self.k, bias=False)
        self.cross_attn_layers = nn.ModuleList(CrossAttention(part) for _ in range(part.num_hidden_layers if part.cross_attn_all_layers else 1))


class Encoder(Local):
    def __init__(self, config):
        super().__init__(config, config.encoder, config.encoder.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.encoder.hidden_size)

    def forward(self, embedded, past, lengths):
        return self.run(F.dropout(F.dropout(embedded, self.dropout, self.training), self.dropout, self.training), past, lengths)  # twice: transformers

    def patches(self, h, patch_ids, num_patches):
        """(B, S, k * D) of bytes h (B, L, D). Of several cross-attention layers only the last one's output is used, as in transformers."""
        x = self.patch_embedding_projection(terrazzo.patch_reduce(h, patch_ids, num_patches)).view(h.shape[0], num_patches * self.k, -1)
        cross = self.cross_attn_layers[-1]
        return cross(x, cross.keys_values(h), patch_ids, num_patches, self.k, "patches").view(h.shape[0], num_patches, -1)


class Global(Stack):
    def __init__(self, config):
        super().__init__(config.global_, None)
        inner, D, self.dropout = config.encoder.hidden_size * config.cross_attn_k, config.global_.hidden_size, config.global_.dropout
        self.token_embedding_projection = nn.Identity() if inner == D else layers.Linear(inner, D, bias=False)

    def forward(self, patches, past, lengths):
        return self.run(F.dropout(self.token_embedding_projection(patches), self.dropout, self.training), past, lengths)


class Decoder(Local):
    def __init__(self, config):
        super().__init__(config, config.decoder, config.global_.hidden_size)
        self.norm = layers.RMSNorm(config.decoder.hidden_size, config.decoder.rms_norm_eps)

    def keys_values(self, patches):
        """For each cross-attention layer (B, S * k, Hk, P) twice."""
        x = self.patch_embedding_projection(patches).view(patches.shape[0], patches.shape[1] * self.k, -1)
        return [cross.keys_values(x) for cross in self.cross_attn_layers]

    def forward(self, h, keys_values, patch_ids, past, lengths):
        num_patches = keys_values[0][0].shape[1] // self.k

        def ask(i, h):
            return self.cross_attn_layers[i](h, keys_values[i], patch_ids, num_patches, self.k, "bytes") if i < len(keys_values) else h

        return self.norm(self.run(F.dropout(h, self.dropout, self.training), past, lengths, ask))


class BltState:
    """What a text leaves behind: windows of the three byte stacks, the global model's keys and values, and the open patch.

    length: bytes so far, of the longest row. Rows of a batch may differ in length and in their patches.
    """

    def __init__(self, model, config):
        self.length, self.pasts = 0, {name: stack.past() for name, stack in model.stacks()}
        self.config, self.tail, self.patcher, self.closed = config, None, None, None
        self.open = []  # [(encoder's output (B, n, D), patch (B, n): 0 for the open one, -1 for padding)]

    def begin(self, batch, like, dtype):
        c = self.config
        self.tail = like.new_zeros(batch, max((1, *c.encoder_hash_byte_group_size)) - 1)  # the bytes that hashes look back on; zeros before the text
        if c.cuts_by_entropy:
            dtype = torch.float64 if dtype == torch.float64 else torch.float32  # entropies'
            self.patcher = PatcherState(batch, c.patching_threshold, max_patch_length=c.max_patch_length, dtype=dtype, device=like.device)

    def reorder(self, rows):
        for past in self.pasts.values():
            past.reorder(rows)
        self.tail, self.open = self.tail[rows], [(h[rows], patch[rows]) for h, patch in self.open]
        self.closed = [(k[rows], v[rows]) for k, v in self.closed]
        if self.patcher is not None:
            self.patcher.reorder(rows)


def _unpadded(lengths, filler, *values):
    """Each of values (B, L) with `filler` on the padding behind its rows."""
    if lengths is None:
        return values
    padding = torch.arange(values[0].shape[1], device=lengths.device) >= lengths[:, None]
    return [value.masked_fill(padding, filler) for value in values]


class BltModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.local_encoder, self.global_transformer, self.local_decoder = Encoder(config), Global(config), Decoder(config)
        tables = config.encoder_hash_byte_group_nb_functions * len(config.encoder_hash_byte_group_size)
        self.encoder_hash_tok_embedding = nn.Embedding(tables * config.encoder_hash_byte_group_vocab, config.encoder.hidden_size)
        self.patcher = EntropyModel(config.patcher).requires_grad_(False) if config.patch_in_forward else None

    def stacks(self):
        names = ("local_encoder", "global_transformer", "local_decoder", *(("patcher",) if self.config.cuts_by_entropy else ()))
        return [(name, getattr(self, name)) for name in names]

    def embed(self, ids):
        c = self.config
        return terrazzo.byte_hash_embedding(ids, self.encoder_hash_tok_embedding.weight, self.local_encoder.embed_tokens.weight, c.encoder_hash_byte_group_size,
                                            c.encoder_hash_byte_group_nb_functions, c.encoder_hash_byte_group_vocab)

    def forward(self, ids, lengths, patch_lengths):
        """The decoder's output (B, L, D) of whole texts; lengths: (B,), padding behind, or None."""
        own, reads, S = self._given(ids, patch_lengths) if patch_lengths is not None else self._cut(ids, lengths)
        h = self.local_encoder(self.embed(ids), None, None)
        patches = self.global_transformer(self.local_encoder.patches(h, own, S), None, None)
        return self.local_decoder(h, self.local_decoder.keys_values(patches), reads, None, None)

    @torch.compiler.disable  # how many patches there are depends on the text
    @torch.no_grad()
    def _cut(self, ids, lengths):
        """The patch of each byte, the one that it asks, and how many have closed."""
        (B, L), c = ids.shape, self.config
        if c.cuts_by_entropy:
            cut = patches_from_entropies(self.patcher.entropies(ids), c.patching_threshold, max_patch_length=c.max_patch_length, include_next=True)
            patches = cut.patch_ids
        else:
            patches = torch.arange(L + 1, dtype=torch.int32, device=ids.device).repeat(B, 1)
        own, reads = _unpadded(lengths, -1, patches[:, :-1], patches[:, 1:] - 1)
        return own, reads, int(reads.max()) + 1

    def _given(self, ids, patch_lengths):
        L = ids.shape[1]
        own = patch_ids_from_lengths(patch_lengths, L, exact=False)
        reads = patch_ids_from_lengths(patch_lengths[:, 1:] if patch_lengths.shape[1] > 1 else patch_lengths, L, exact=False)
        return own, torch.minimum(reads, own[:, -1:]), patch_lengths.shape[1]

    @torch.no_grad()
    def _closes(self, ids, lengths, state):
        """(B, L) bool: a patch ends with this byte."""
        if state.patcher is None:
            return _unpadded(lengths, False, torch.ones_like(ids, dtype=torch.bool))[0]
        return state.patcher.update(self.patcher.entropies(ids, state.pasts["patcher"], lengths), lengths)[0]

    def go_on(self, ids, lengths, state):
        """As forward, for bytes behind those that `state` keeps, which is brought up to date. The global model runs where a patch closes."""
        if state.tail is None:
            state.begin(ids.shape[0], ids, self.local_encoder.embed_tokens.weight.dtype)
        known = state.tail.shape[1]
        text = torch.cat([state.tail, ids], 1)
        h = self.local_encoder(self.embed(text)[:, known:], state.pasts["local_encoder"], lengths)
        state.tail = text[:, text.shape[1] - known :] if lengths is None else text.gather(1, lengths[:, None] + torch.arange(known, device=ids.device))
        done = self._closes(ids, lengths, state).cumsum(1)  # patches closed so far
        own, count = F.pad(done, (1, 0))[:, :-1], done[:, -1]
        own, reads = _unpadded(lengths, -1, own, done if state.closed else done - 1)
        state.open.append((h, own))
        S = int(count.max())
        keys_values = self._close(count, S, state) if S else state.closed
        state.length += ids.shape[1]
        return self.local_decoder(h, keys_values, reads, state.pasts["local_decoder"], lengths)

    def _close(self, count, S, state):
        """Keys and values of the patch that had closed before, if one had, and of the `count` (B,) that close now."""
        k, rows = self.config.cross_attn_k, torch.arange(len(count), device=count.device)
        h, own = (torch.cat(parts, 1) for parts in zip(*state.open))
        patches = self.local_encoder.patches(h, own, S)
        patches = self.global_transformer(patches, state.pasts["global_transformer"], None if bool((count == S).all()) else count)
        keys_values = self.local_decoder.keys_values(patches)
        last = count - 1
        if state.closed:
            keys_values = [tuple(torch.cat(pair, 1) for pair in zip(*two)) for two in zip(state.closed, keys_values)]
            last = count
        state.closed = [tuple(t.unflatten(1, (-1, k))[rows, last] for t in pair) for pair in keys_values]
        still = own == count[:, None]
        n = int(still.sum(1).max())
        index = still.int().argsort(dim=1, stable=True)[:, still.shape[1] - n :]
        state.open = [(h[rows[:, None], index], still.gather(1, index).int() - 1)] if n else []
        return keys_values


class Blt(loading.Pretrained, CausalGeneration):
    """Blt(config) is untrained; Blt.from_pretrained(directory) reads a checkpoint of transformers' BltForCausalLM. Token 4 + b is byte b."""

    Config, model_types = BltConfig, ("blt",)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = BltModel(config)
        self.lm_head = layers.Linear(config.decoder.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        with torch.no_grad():  # transformers' initialisation: variance 1 / width
            for weight in self.parameters():
                if weight.dim() > 1:
                    nn.init.trunc_normal_(weight, std=weight.shape[1] ** -0.5, a=-3 * weight.shape[1] ** -0.5, b=3 * weight.shape[1] ** -0.5)

    @property
    def gradient_checkpointing(self):
        return self.model.local_encoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, again):
        """True: layers are computed again in the backward pass instead of kept."""
        for _, stack in self.model.stacks():
            stack.gradient_checkpointing = again

    def tied(self):
        return {"model.local_encoder.embed_tokens.weight": "lm_head.weight"} if self.config.tie_word_embeddings else {}

    def new_state(self):
        """The begin of a text: the state that forward and generate carry."""
        return BltState(self.model, self.config)

    def forward(self, input_ids, labels=None, attention_mask=None, patch_lengths=None, state=None, logits_to_keep=0):
        """Logits of the byte behind each of input_ids, and the loss.

        Args:
            input_ids: (B, L) int64. labels: (B, L), the tokens themselves (each is judged by the logits before it), -100 where none counts.
            attention_mask: (B, L) of these bytes, zero on padding, in front of a text or behind it; or None. A padded row has the
                logits of the text alone (in transformers it has not: its patcher, hashes and patches see the padding).
            patch_lengths: (B, S) int64 or int32, how the texts are cut, instead of the patcher; each row sums to L; a last patch of
                length 0 says that the byte behind the text starts one.
            state: what new_state() or the call before left, brought up to date; None: a text of its own, nothing kept.
            logits_to_keep: only those of the last positions; 0: all.

        Returns: Output(logits (B, L, V) float32, loss or None). Equivalent to: transformers' BltForCausalLM, but for what its
        max_patch_length and patch_size=None do to the last byte: there it forgets that the byte behind may start a patch.
        """
        layers.check_ids(FN, "input_ids", input_ids, self.config.vocab_size)
        layers.check_labels(FN, labels, input_ids.shape, self.config.vocab_size, logits_to_keep)
        valid = layers.check_valid(FN, attention_mask, *input_ids.shape)
        self._check_lengths(input_ids, patch_lengths, valid, state)
        lengths, order = (None, None) if valid is None else self._text_first(valid)
        ids = input_ids if order is None else input_ids.gather(1, order)
        h = self.model(ids, lengths, patch_lengths) if state is None else self.model.go_on(ids, lengths, state)
        if order is not None:
            h = h.gather(1, order.argsort(1)[:, :, None].expand_as(h))
        logits = self.lm_head(h[:, -logits_to_keep:] if logits_to_keep else h).float()
        return layers.Output(logits, None if labels is None else layers.causal_loss(logits, labels))

    def _text_first(self, valid):
        """Lengths (B,) of the texts, and an order (B, L) of positions in which padding stands behind them, or None: it does."""
        lengths, first, position = valid.sum(1), valid.int().argmax(1), torch.arange(valid.shape[1], device=valid.device)
        if bool((valid != ((position >= first[:, None]) & (position < (first + lengths)[:, None]))).any()) or not bool(lengths.all()):
            raise ValueError(f"{FN}: attention_mask must be one on a single run of bytes in every row; padding stands in front of a text or behind it")
        return lengths, (position + first[:, None]) % valid.shape[1] if bool(first.any()) else None

    def _check_lengths(self, ids, patch_lengths, valid, state):
        if patch_lengths is None:
            return
        if state is not None or valid is not None:
            raise ValueError(f"{FN}: patch_lengths goes without state and attention_mask")
        if not isinstance(patch_lengths, torch.Tensor) or patch_lengths.dim() != 2 or len(patch_lengths) != len(ids) or not patch_lengths.shape[1]:
            got = tuple(patch_lengths.shape) if isinstance(patch_lengths, torch.Tensor) else type(patch_lengths).__name__
            raise ValueError(f"{FN}: patch_lengths must be (B, S) = ({len(ids)}, S), got {got}")
        if not torch.compiler.is_compiling() and bool((patch_lengths.sum(1) != ids.shape[1]).any()):
            raise ValueError(f"{FN}: every row of patch_lengths must sum to L = {ids.shape[1]}, got {patch_lengths.sum(1).tolist()}")

    def begin(self, input_ids, valid):
        state = self.new_state()
        state.valid = valid
        return input_ids, state

    def advance(self, ids, state):
        return self(ids, attention_mask=None if state.length else state.valid, state=state, logits_to_keep=1).logits[:, -1]
