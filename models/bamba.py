"""Bamba: layers of Mamba-2 with a few of attention between them, each followed by a gated MLP (IBM, Princeton, UIUC 2024).

Symbols: B batch, L positions, D hidden_size, H heads and P channels of one, G groups and N state of the scan. Tensor names are
transformers', so its checkpoints load as they are.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

import terrazzo

from . import layers, loading, steps
from .generation import CausalGeneration

FN = "terrazzo.Bamba"


@dataclass
class BambaConfig:
    """By transformers' names."""

    vocab_size: int = 128000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    attn_layer_indices: tuple = ()     # the layers that attend; the others scan
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    rope_theta: float = 10000.0
    max_position_embeddings: int = 262144  # told to others; nothing here depends on it
    mamba_n_heads: int = 128
    mamba_d_head: int | str = "auto"   # P; "auto": mamba_expand * D / mamba_n_heads
    mamba_n_groups: int = 1
    mamba_d_state: int = 256
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_chunk_size: int = 256        # a hint: the kernels choose their own
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    time_step_limit: tuple = (0.0, math.inf)
    z_loss_coefficient: float = 0.0
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2

    def __post_init__(self):
        self.attn_layer_indices = tuple(self.attn_layer_indices or ())
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.time_step_limit = tuple(map(float, self.time_step_limit or (0.0, math.inf)))
        inner = self.mamba_expand * self.hidden_size
        if self.mamba_d_head == "auto":
            self.mamba_d_head = inner // self.mamba_n_heads
        if self.mamba_d_head * self.mamba_n_heads != inner:
            raise ValueError(f"{FN}: mamba_n_heads * mamba_d_head must be mamba_expand * hidden_size = {inner}, got {self.mamba_n_heads} * {self.mamba_d_head}")
        if self.mamba_n_heads % self.mamba_n_groups:
            raise ValueError(f"{FN}: mamba_n_groups must divide mamba_n_heads {self.mamba_n_heads}, got {self.mamba_n_groups}")
        if self.hidden_size % self.num_attention_heads or self.hidden_size // self.num_attention_heads % 4:
            raise ValueError(f"{FN}: hidden_size must be num_attention_heads {self.num_attention_heads} times a multiple of 4, got {self.hidden_size}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{FN}: num_key_value_heads must divide num_attention_heads {self.num_attention_heads}, got {self.num_key_value_heads}")
        if any(not 0 <= layer < self.num_hidden_layers for layer in self.attn_layer_indices):
            raise ValueError(f"{FN}: attn_layer_indices must lie in 0 to {self.num_hidden_layers - 1}, got {self.attn_layer_indices}")
        layers.activation(FN, self.hidden_act)

    @classmethod
    def from_hf(cls, config):
        """From the dict of a config.json."""
        known = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        kinds = config.get("layer_types") or config.get("layers_block_type")
        if known.get("attn_layer_indices") is None and kinds:
            known["attn_layer_indices"] = [i for i, kind in enumerate(kinds) if kind in ("full_attention", "attention")]
        if known.get("time_step_limit"):  # JSON has no infinity: transformers writes {"__float__": "Infinity"}
            known["time_step_limit"] = [bound["__float__"] if isinstance(bound, dict) else bound for bound in known["time_step_limit"]]
        return cls(**known | {"rope_theta": loading.rope_theta(FN, config, cls.rope_theta)})

    def to_hf(self):
        config = asdict(self)
        rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta"), "partial_rotary_factor": 0.5}
        config["time_step_limit"] = [{"__float__": "Infinity"} if math.isinf(bound) else bound for bound in self.time_step_limit]
        return {"model_type": "bamba", "architectures": ["BambaForCausalLM"], "rope_parameters": rope} | config


class MambaState:
    """conv: (B, channels, W - 1), the last inputs of the convolution; ssm: (B, H, P, N) float32."""

    conv = ssm = None
    steps = ()  # what the layer does with one position by the fused ops

    def reorder(self, rows):
        if self.conv is not None:
            self.conv, self.ssm = self.conv[rows], self.ssm[rows]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, bias = config.hidden_size, config.attention_bias
        self.head_dim, self.dropout = D // config.num_attention_heads, config.attention_dropout
        self.q_proj = layers.Linear(D, D, bias)
        self.k_proj = layers.Linear(D, config.num_key_value_heads * self.head_dim, bias)
        self.v_proj = layers.Linear(D, config.num_key_value_heads * self.head_dim, bias)
        self.o_proj = layers.Linear(D, D, bias)

    def forward(self, h, norm, context, past):
        """h + what the attention makes of norm(h)."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in steps.normed(h, norm, self.q_proj, self.k_proj, self.v_proj))
        q, k = layers.rotate(q, context.turns), layers.rotate(k, context.turns)
        if past is not None:
            k, v = past.append(k, v)
        return steps.added(h, context.attend(q, k, v, self.dropout if self.training else 0.0), self.o_proj)


class Mamba(nn.Module):
    """in_proj -> (gate, xBC, dt); xBC through the convolution; the scan; the gated norm; out_proj."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        H, inner = config.mamba_n_heads, config.mamba_expand * config.hidden_size
        self.parts = [inner, *[config.mamba_n_groups * config.mamba_d_state] * 2]  # channels of x, B, C
        self.channels = sum(self.parts)
        self.in_proj = layers.Linear(config.hidden_size, inner + self.channels + H, config.mamba_proj_bias)
        self.conv1d = nn.Conv1d(self.channels, self.channels, config.mamba_d_conv, groups=self.channels, bias=config.mamba_conv_bias)
        self.dt_bias = nn.Parameter(torch.ones(H))
        self.A_log = nn.Parameter(torch.arange(1, H + 1).float().log())
        self.D = nn.Parameter(torch.ones(H))
        self.norm = layers.RMSNorm(inner, config.rms_norm_eps)
        self.out_proj = layers.Linear(inner, config.hidden_size, config.mamba_proj_bias)

    def forward(self, h, norm, context, past):
        """h + what the mixer makes of norm(h)."""
        valid, inner = context.valid, self.parts[0]
        projected = steps.normed(h, norm, self.in_proj)[0] if valid is None else self.in_proj(norm(h) * valid)
        gate, xBC, dt = projected.split([inner, self.channels, inner // self.config.mamba_d_head], -1)
        step = past is not None and past.conv is not None and h.shape[1] == 1
        xBC = self._convolve(xBC.transpose(1, 2), context, past, step).transpose(1, 2)
        x, B, C = (xBC if valid is None else xBC * valid).split(self.parts, -1)
        x, (B, C) = x.unflatten(-1, (-1, self.config.mamba_d_head)), self._groups(B, C)
        y = self._step(x, dt, B, C, past) if step else self._scan(x, dt, B, C, context, past)
        return steps.added(h, self._norm(y.flatten(-2), gate), self.out_proj)

    def _groups(self, B, C):
        """(B, L, G, N) each."""
        return B.unflatten(-1, (-1, self.config.mamba_d_state)), C.unflatten(-1, (-1, self.config.mamba_d_state))

    def _norm(self, y, gate):
        width = self.config.mamba_n_heads * self.config.mamba_d_head // self.config.mamba_n_groups
        return terrazzo.rmsnorm_gated(y, self.norm.weight, gate, self.norm.eps, width, norm_before_gate=False)

    def _convolve(self, x, context, past, step):
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if step:
            return terrazzo.causal_conv1d_update(x, past.conv, weight, bias, "silu")
        if past is None:
            return context.convolve(x, weight, bias)
        y, past.conv = terrazzo.causal_conv1d_fn(x, weight, bias, None, past.conv, True, activation="silu")
        return y

    def _scan(self, x, dt, B, C, context, past):
        c = self.config
        args = (x, dt, -self.A_log.float().exp(), B, C, c.mamba_chunk_size)
        options = dict(D=self.D, dt_bias=self.dt_bias, dt_softplus=True, dt_limit=c.time_step_limit)
        if past is None:
            return context.scan(*args, **options)
        y, past.ssm = terrazzo.mamba_chunk_scan_combined(*args, **options, initial_states=past.ssm, return_final_states=True)
        return y

    def _step(self, x, dt, B, C, past):
        P, N = self.config.mamba_d_head, self.config.mamba_d_state
        bias, softplus = self.dt_bias[:, None].expand(-1, P), True
        if self.config.time_step_limit != (0.0, math.inf):  # the kernel has no limit; transformers forgets it here
            dt, bias, softplus = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.config.time_step_limit).to(dt.dtype), None, False
        A = -self.A_log.float().exp()[:, None, None].expand(-1, P, N)
        y = terrazzo.selective_state_update(past.ssm, x[:, 0], dt[:, 0, :, None].expand(-1, -1, P), A, B[:, 0], C[:, 0], self.D[:, None].expand(-1, P), None, bias, softplus)
        return y[:, None]


class Context:
    """What all layers of one call share, and how rows without a state look back along themselves."""

    def __init__(self, config, input_ids, labels, state, valid, cu_seqlens, dtype):
        L, before, device = input_ids.shape[1], 0 if state is None else state.length, input_ids.device
        self.labels = labels
        self.mask = layers.Mask.causal(L, before, valid, cu_seqlens, device)
        positions = layers.positions_of(valid, L, before, cu_seqlens, device)
        self.turns = layers.rotations(positions, config.hidden_size // config.num_attention_heads // 2, config.rope_theta, dtype)
        self.valid = None if valid is None or L == 1 else valid[:, before:, None].to(dtype)
        self.seq_idx = None if cu_seqlens is None else layers.text_of(cu_seqlens, before, L)[None].int()
        self.turns_of_step = None if L > 1 or not before or self.mask.sees is not None else tuple(t[:, 0, 0] for t in self.turns)

    def attend(self, q, k, v, dropout):
        return layers.attend(q, k, v, self.mask, dropout=dropout)

    def convolve(self, x, weight, bias):
        return terrazzo.causal_conv1d_fn(x, weight, bias, self.seq_idx, activation="silu")

    def scan(self, *args, **options):
        return terrazzo.mamba_chunk_scan_combined(*args, seq_idx=self.seq_idx, **options)

    def loss(self, logits, z):
        """The mean cross entropy of the labels, and z times the mean square of the logits' logsumexp."""
        loss = layers.causal_loss(logits, self.labels)
        return loss + z * layers.logsumexp(logits).to(loss.dtype).square().mean() if z > 0 else loss


class Layer(nn.Module):
    def __init__(self, config, attends):
        super().__init__()
        self.kind = "self_attn" if attends else "mamba"
        self.add_module(self.kind, (Attention if attends else Mamba)(config))
        self.input_layernorm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_ff_layernorm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = layers.GatedMLP(config.hidden_size, config.intermediate_size, layers.activation(FN, config.hidden_act), config.mlp_bias)

    def forward(self, h, context, past):
        step = past is not None and past.steps and context.turns_of_step and not self.training and steps.in_steps(h)
        if self.kind == "mamba":
            h = self.mamba(h, self.input_layernorm, context, past)
        elif step:
            h = past.steps[0](h[:, 0], *past.step(), context.turns_of_step)[:, None]
        else:
            h = self.self_attn(h, self.input_layernorm, context, past)
        return past.steps[-1](h[:, 0])[:, None] if step else steps.mlp(h, self.pre_ff_layernorm, self.feed_forward)

    def new_past(self):
        """What the layer keeps of a text, and what it does with one position of it by the fused ops: steps, or ()."""
        past, attends, mlp = layers.KVCache() if self.kind == "self_attn" else MambaState(), self.kind == "self_attn", self.feed_forward
        attention = [getattr(self.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")] + [self.self_attn, self.input_layernorm] if attends else []
        if steps.is_plain(*attention, self.pre_ff_layernorm, mlp, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            first = [steps.AttentionStep(self.input_layernorm, self.self_attn)] if attends else []
            past.steps = (*first, steps.MLPStep(self.pre_ff_layernorm, mlp))
        return past


class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Layer(config, i in config.attn_layer_indices) for i in range(config.num_hidden_layers))
        self.final_layernorm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Bamba(loading.Pretrained, CausalGeneration):
    """Bamba(config) is untrained; Bamba.from_pretrained(directory) reads a checkpoint of transformers' BambaForCausalLM."""

    Config, model_types = BambaConfig, ("bamba",)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: layers are computed again in the backward pass instead of kept
        self.context = Context               # terrazzo.distributed.context_parallel puts another in its place
        self.model = Backbone(config)
        self.lm_head = layers.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        layers.initialise(self, config.initializer_range)

    def new_state(self):
        """The begin of a text: the state that forward and generate carry."""
        return layers.State(layer.new_past() for layer in self.model.layers)

    def tied(self):
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}

    def forward(self, input_ids, labels=None, attention_mask=None, cu_seqlens=None, state=None, logits_to_keep=0):
        """Logits of the token behind each of input_ids, and the loss.

        Args:
            input_ids: (B, L) int64. labels: (B, L), the tokens themselves (each is judged by the logits before it), -100 where none counts.
            attention_mask: (B, past + L), zero on padding, or None.
            cu_seqlens: (S + 1,) int32: bounds of S texts packed into a batch of one; none knows of another.
            state: what new_state() or the call before left, brought up to date; None: a text of its own, nothing kept.
            logits_to_keep: only those of the last positions; 0: all.

        Returns: Output(logits (B, L, V), loss or None). Equivalent to: transformers' BambaForCausalLM.
        """
        valid = layers.check_call(FN, input_ids, labels, self.config.vocab_size, attention_mask, cu_seqlens, state, logits_to_keep)
        h = self.model.embed_tokens(input_ids)
        context = self.context(self.config, input_ids, labels, state, valid, cu_seqlens, h.dtype)
        for i, layer in enumerate(self.model.layers):
            past = None if state is None else state.layers[i]
            h = layers.run(layer, h, context, past, again=self.gradient_checkpointing and self.training and past is None)
        if state is not None:
            state.length += input_ids.shape[1]
        (logits,) = steps.normed(h[:, -logits_to_keep:] if logits_to_keep else h, self.model.final_layernorm, self.lm_head)
        return layers.Output(logits, None if labels is None else context.loss(logits, self.config.z_loss_coefficient))
