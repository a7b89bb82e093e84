"""DBRX: attention with clipped projections, and experts of which every token asks the top few (Databricks 2024).

Symbols: D d_model, E experts, A experts a token, F width of an expert. Tensor names are transformers', so its checkpoints load.
"""
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import terrazzo

from ..adapters import better_left, plain_tensors
from . import layers, loading, steps
from .generation import CausalGeneration

FN = "terrazzo.Dbrx"


class MoeOutput(NamedTuple):
    """Output, with what output_router_logits asks for. aux_loss: scalar; router_logits: (B * L, E) for each layer."""

    logits: torch.Tensor
    loss: torch.Tensor | None
    aux_loss: torch.Tensor
    router_logits: tuple


@dataclass
class AttentionConfig:
    kv_n_heads: int = 1
    clip_qkv: float | None = None   # projections are cut to -clip_qkv ... clip_qkv
    attn_pdrop: float = 0.0


@dataclass
class FFNConfig:
    ffn_hidden_size: int = 3584
    moe_num_experts: int = 4
    moe_top_k: int = 1
    moe_normalize_expert_weights: float | None = 1.0  # p of the norm that a token's weights are divided by
    moe_jitter_eps: float | None = None               # in training the experts' input is multiplied by 1 - eps ... 1 + eps
    moe_loss_weight: float = 0.01
    ffn_act_fn: dict = field(default_factory=lambda: {"name": "silu"})


@dataclass
class DbrxConfig:
    """By transformers' names."""

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    vocab_size: int = 32000
    max_seq_len: int = 2048  # told to others; nothing here depends on it
    attn_config: AttentionConfig = field(default_factory=AttentionConfig)
    ffn_config: FFNConfig = field(default_factory=FFNConfig)
    rope_theta: float = 10000.0
    resid_pdrop: float = 0.0
    emb_pdrop: float = 0.0
    initializer_range: float = 0.02
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    def __post_init__(self):
        attn, ffn = self.attn_config, self.ffn_config
        if self.tie_word_embeddings:
            raise ValueError(f"{FN}: tie_word_embeddings must be False: DBRX has a head of its own")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"{FN}: d_model must be n_heads {self.n_heads} times an even size, got {self.d_model}")
        if self.n_heads % attn.kv_n_heads:
            raise ValueError(f"{FN}: kv_n_heads must divide n_heads {self.n_heads}, got {attn.kv_n_heads}")
        if not 1 <= ffn.moe_top_k <= ffn.moe_num_experts:
            raise ValueError(f"{FN}: moe_top_k must lie in 1 to moe_num_experts {ffn.moe_num_experts}, got {ffn.moe_top_k}")
        layers.activation(FN, ffn.ffn_act_fn.get("name"))

    @classmethod
    def from_hf(cls, config):
        """From the dict of a config.json. The base of the rotary embedding stands at the top, or in attn_config (databricks' own files)."""
        parts = {"attn_config": AttentionConfig, "ffn_config": FFNConfig}
        known = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        for ours, theirs in {"d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers", "max_seq_len": "max_position_embeddings"}.items():
            if theirs in config:
                known.setdefault(ours, config[theirs])
        for name, part in parts.items():
            found = config.get(name) or {}
            known[name] = part(**{key: found[key] for key in part.__dataclass_fields__ if found.get(key) is not None or key == "moe_normalize_expert_weights" and key in found})
        default = (config.get("attn_config") or {}).get("rope_theta") or cls.rope_theta
        return cls(**known | {"rope_theta": loading.rope_theta(FN, config, default)})

    def to_hf(self):
        config = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "rope_theta"}
        config |= {"attn_config": vars(self.attn_config) | {"rope_theta": self.rope_theta}, "ffn_config": dict(vars(self.ffn_config))}
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {"model_type": "dbrx", "architectures": ["DbrxForCausalLM"], "rope_parameters": rope} | config


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, attn = config.d_model, config.attn_config
        self.head_dim, self.clip, self.dropout = D // config.n_heads, attn.clip_qkv, attn.attn_pdrop
        self.widths = [D, attn.kv_n_heads * self.head_dim, attn.kv_n_heads * self.head_dim]
        self.Wqkv = layers.Linear(D, sum(self.widths), bias=False)
        self.out_proj = layers.Linear(D, D, bias=False)

    def forward(self, h, mask, turns, past):
        qkv = self.Wqkv(h)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        if steps.is_step(qkv, mask, past) and not self.training:
            y = terrazzo.attention_update(qkv[:, 0], *past.step(), rotary_cos=turns[0][:, 0, 0], rotary_sin=turns[1][:, 0, 0])
            return self.out_proj(y[:, None])
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in qkv.split(self.widths, -1))
        q, k = layers.rotate(q, turns), layers.rotate(k, turns)
        if past is not None:
            k, v = past.append(k, v)
        return self.out_proj(layers.attend(q, k, v, mask, dropout=self.dropout if self.training else 0.0))


class NormAttentionNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.d_model, bias=False)
        self.attn = Attention(config)
        self.norm_2 = nn.LayerNorm(config.d_model, bias=False)


class Router(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = layers.Linear(config.d_model, config.ffn_config.moe_num_experts, bias=False)


class ExpertWeights(nn.Module):
    """w1, v1, w2: (E * F, D) each; expert e is h -> (act(h w1[e]^T) * (h v1[e]^T)) w2[e]."""

    def __init__(self, config):
        super().__init__()
        rows = config.ffn_config.moe_num_experts * config.ffn_config.ffn_hidden_size
        for name in ("w1", "v1", "w2"):
            setattr(self, name, nn.Parameter(torch.empty(rows, config.d_model).normal_(0, config.initializer_range)))


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts, self.activation = config.ffn_config.moe_num_experts, config.ffn_config.ffn_act_fn["name"]
        self.mlp = ExpertWeights(config)

    def forward(self, tokens, indices, weights):
        w = self.mlp
        plain = plain_tensors(w.w1, w.v1, w.w2) and tokens.dtype == w.w1.dtype and self.activation in layers.ACTIVATIONS
        if plain and not torch.compiler.is_compiling() and better_left(indices, w.w1, self.num_experts, None):
            return _one_by_one(self, tokens, indices, weights)
        return terrazzo.fused_experts(tokens, w.w1, w.w2, weights, indices, w_up=w.v1, activation=self.activation, num_experts=self.num_experts)


def _one_by_one(experts, tokens, indices, weights):
    """Experts' outputs by torch's products, where those have instructions that the kernels lack. Experts beyond num_experts are another rank's."""
    order, inverse, ends = terrazzo.moe_permute(indices, experts.num_experts)
    *rows, rest = tokens[order // indices.shape[1]].tensor_split(ends.tolist())
    w1, v1, w2 = (w.unflatten(0, (experts.num_experts, -1)) for w in (experts.mlp.w1, experts.mlp.v1, experts.mlp.w2))
    act = layers.ACTIVATIONS[experts.activation]
    y = [(act(x @ w1[e].T) * (x @ v1[e].T)) @ w2[e] for e, x in enumerate(rows)]
    return terrazzo.moe_unpermute(torch.cat([*y, torch.zeros_like(rest)]), inverse, weights)


class FFN(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config.ffn_config
        self.router, self.experts = Router(config), Experts(config)

    def forward(self, h):
        c = self.config
        if self.training and c.moe_jitter_eps is not None:
            h = h * torch.empty_like(h).uniform_(1 - c.moe_jitter_eps, 1 + c.moe_jitter_eps)
        tokens = h.flatten(0, -2)
        logits = self.router.layer(tokens)
        weights, indices = terrazzo.moe_route(logits, c.moe_top_k, norm_order=c.moe_normalize_expert_weights)
        return self.experts(tokens, indices, weights).view_as(h), logits


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.resid_pdrop
        self.norm_attn_norm, self.ffn = NormAttentionNorm(config), FFN(config)

    def forward(self, h, mask, turns, past):
        part = self.norm_attn_norm
        h = h + F.dropout(part.attn(part.norm_1(h), mask, turns, past), self.dropout, self.training)
        y, router_logits = self.ffn(part.norm_2(h))
        return h + F.dropout(y, self.dropout, self.training), router_logits


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_f = nn.LayerNorm(config.d_model, bias=False)


class Dbrx(loading.Pretrained, CausalGeneration):
    """Dbrx(config) is untrained; Dbrx.from_pretrained(directory) reads a checkpoint of transformers' DbrxForCausalLM."""

    Config, model_types = DbrxConfig, ("dbrx",)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: blocks are computed again in the backward pass instead of kept
        self.transformer = Transformer(config)
        self.lm_head = layers.Linear(config.d_model, config.vocab_size, bias=False)
        layers.initialise(self, config.initializer_range)

    def new_state(self):
        """The begin of a text: the state that forward and generate carry."""
        return layers.State(layers.KVCache() for _ in self.transformer.blocks)

    def forward(self, input_ids, labels=None, attention_mask=None, cu_seqlens=None, state=None, logits_to_keep=0, output_router_logits=None):
        """Logits of the token behind each of input_ids, and the loss.

        Args:
            input_ids, labels, attention_mask, cu_seqlens, state, logits_to_keep: as in `Bamba.forward`.
            output_router_logits: return MoeOutput, and add moe_loss_weight * aux_loss to the loss; None: as the config says.

        Returns: Output(logits (B, L, V), loss or None), or MoeOutput. Equivalent to: transformers' DbrxForCausalLM.
        """
        c = self.config
        valid = layers.check_call(FN, input_ids, labels, c.vocab_size, attention_mask, cu_seqlens, state, logits_to_keep)
        L, before = input_ids.shape[1], 0 if state is None else state.length
        h = F.dropout(self.transformer.wte(input_ids), c.emb_pdrop, self.training)
        mask = layers.Mask.causal(L, before, valid, cu_seqlens, h.device)
        turns = layers.rotations(layers.positions_of(valid, L, before, cu_seqlens, h.device), c.d_model // c.n_heads, c.rope_theta, h.dtype)
        router_logits = []
        for i, block in enumerate(self.transformer.blocks):
            past = None if state is None else state.layers[i]
            h, logits = layers.run(block, h, mask, turns, past, again=self.gradient_checkpointing and self.training and past is None)
            router_logits.append(logits)
        if state is not None:
            state.length += L
        logits = self.lm_head(self.transformer.norm_f(h[:, -logits_to_keep:] if logits_to_keep else h))
        loss = None if labels is None else layers.causal_loss(logits, labels)
        if not (c.output_router_logits if output_router_logits is None else output_router_logits):
            return layers.Output(logits, loss)
        seen = None if attention_mask is None else attention_mask[:, before:]
        aux = terrazzo.load_balancing_loss(tuple(router_logits), c.ffn_config.moe_num_experts, c.ffn_config.moe_top_k, seen)
        return MoeOutput(logits, None if loss is None else loss + c.ffn_config.moe_loss_weight * aux, aux, tuple(router_logits))
