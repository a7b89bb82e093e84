"""Blenderbot: an encoder reads the turns of a chat, a decoder answers (Roller et al. 2020). Pre-norm, learned positions.

Symbols: D d_model, H heads, S positions of the question, L of the answer. Tensor names are transformers', so its checkpoints load.
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from . import layers, loading
from .generation import Generation

FN = "terrazzo.Blenderbot"


@dataclass
class BlenderbotConfig:
    """By transformers' names."""

    vocab_size: int = 8008
    d_model: int = 2560
    max_position_embeddings: int = 128
    encoder_layers: int = 2
    encoder_attention_heads: int = 32
    encoder_ffn_dim: int = 10240
    decoder_layers: int = 24
    decoder_attention_heads: int = 32
    decoder_ffn_dim: int = 10240
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = False
    tie_word_embeddings: bool = True
    decoder_start_token_id: int = 1
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    forced_eos_token_id: int | list | None = 2
    encoder_no_repeat_ngram_size: int = 3

    def __post_init__(self):
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(f"{FN}: {name} must divide d_model {self.d_model}, got {getattr(self, name)}")
        layers.activation(FN, self.activation_function)

    @classmethod
    def from_hf(cls, config):
        """From the dict of a config.json."""
        return cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})

    def to_hf(self):
        return {"model_type": "blenderbot", "architectures": ["BlenderbotForConditionalGeneration"], "is_encoder_decoder": True} | asdict(self)


class Attention(nn.Module):
    """Of h over itself, or over the question's keys and values."""

    def __init__(self, config, heads):
        super().__init__()
        D = config.d_model
        self.head_dim, self.dropout = D // heads, config.attention_dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (layers.Linear(D, D) for _ in range(4))

    def heads(self, projected):
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(self, h):
        return self.heads(self.k_proj(h)), self.heads(self.v_proj(h))

    def forward(self, h, mask, past=None):
        k, v = self.keys_values(h)
        if past is not None:
            k, v = past.append(k, v)
        return self.out_proj(layers.attend(self.heads(self.q_proj(h)), k, v, mask, dropout=self.dropout if self.training else 0.0))

    def ask(self, h, k, v, mask):
        """h (rows, L, D) over k, v (B, H, S, P): the rows / B beams of a question ask its keys together."""
        beams = len(h) // len(k)
        q = self.q_proj(h).view(len(k), beams * h.shape[1], -1)
        return self.out_proj(layers.attend(self.heads(q), k, v, mask, dropout=self.dropout if self.training else 0.0).view(*h.shape[:2], -1))


class Layer(nn.Module):
    def __init__(self, config, heads, inner, asks):
        super().__init__()
        D = config.d_model
        self.config, self.act = config, layers.activation(FN, config.activation_function)
        self.self_attn, self.self_attn_layer_norm = Attention(config, heads), nn.LayerNorm(D)
        if asks:
            self.encoder_attn, self.encoder_attn_layer_norm = Attention(config, heads), nn.LayerNorm(D)
        self.fc1, self.fc2, self.final_layer_norm = layers.Linear(D, inner), layers.Linear(inner, D), nn.LayerNorm(D)

    def forward(self, h, mask, past=None, question=None, question_mask=None):
        """question: the keys and values (B, H, S, P) of the encoder's output, or that output (B, S, D)."""
        drop = self._dropout
        h = h + drop(self.self_attn(self.self_attn_layer_norm(h), mask, past))
        if question is not None:
            k, v = question if isinstance(question, tuple) else self.encoder_attn.keys_values(question)
            h = h + drop(self.encoder_attn.ask(self.encoder_attn_layer_norm(h), k, v, question_mask))
        inner = F.dropout(self.act(self.fc1(self.final_layer_norm(h))), self.config.activation_dropout, self.training)
        h = h + drop(self.fc2(inner))
        if h.dtype == torch.float16 and question is None and past is None:  # the encoder alone, as in transformers
            limit = torch.finfo(h.dtype).max - 1000
            h = h.clamp(-limit, limit)
        return h

    def _dropout(self, h):
        return F.dropout(h, self.config.dropout, self.training)


class Stack(nn.Module):
    def __init__(self, config, heads, inner, count, layerdrop, asks):
        super().__init__()
        self.config, self.layerdrop = config, layerdrop
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.layers = nn.ModuleList(Layer(config, heads, inner, asks) for _ in range(count))
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, embedded, mask, before=0, past=None, question=None, question_mask=None, again=False):
        end = before + embedded.shape[1]
        if end > self.config.max_position_embeddings:
            raise ValueError(f"{FN}: texts must hold at most max_position_embeddings = {self.config.max_position_embeddings} tokens, got {end}; cut the oldest turns")
        h = embedded + self.embed_positions.weight[before:end]
        h = F.dropout(h, self.config.dropout, self.training)
        for i, layer in enumerate(self.layers):
            if self.training and self.layerdrop and torch.rand(()) < self.layerdrop:
                continue
            asked = question[i] if isinstance(question, list) else question
            h = layers.run(layer, h, mask, past and past[i], asked, question_mask, again=again)
        return self.layer_norm(h)


class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.encoder = Stack(config, config.encoder_attention_heads, config.encoder_ffn_dim, config.encoder_layers, config.encoder_layerdrop, asks=False)
        self.decoder = Stack(config, config.decoder_attention_heads, config.decoder_ffn_dim, config.decoder_layers, config.decoder_layerdrop, asks=True)


class ChatState(layers.State):
    """The answer so far; question: keys and values of each decoder layer, of every question once, whatever the beams."""

    def __init__(self, question, question_mask):
        super().__init__(layers.KVCache() for _ in question)
        self.question, self.question_mask = question, question_mask


class Blenderbot(loading.Pretrained, Generation):
    """Blenderbot(config) is untrained; from_pretrained(directory) reads a checkpoint of BlenderbotForConditionalGeneration."""

    Config, model_types = BlenderbotConfig, ("blenderbot",)
    optional = {"final_logits_bias": lambda config: torch.zeros(1, config.vocab_size)}
    surplus_allowed = ("coder.embed_tokens.weight",)  # copies of model.shared.weight in older files
    is_encoder_decoder = True

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: layers are computed again in the backward pass instead of kept
        self.model = Backbone(config)
        self.lm_head = layers.Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.tie_weights()
        layers.initialise(self, config.init_std)

    def tied(self):
        return {"lm_head.weight": "model.shared.weight"} if self.config.tie_word_embeddings else {}

    def forward(self, input_ids, labels=None, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
        """Logits of the answer's tokens, and the loss.

        Args:
            input_ids: (B, S), the chat so far; attention_mask: (B, S), zero on padding, or None.
            labels: (B, L), the answer, -100 where none counts.
            decoder_input_ids: (B, L), what the decoder has said before each token; by default the labels behind decoder_start_token_id.
            decoder_attention_mask: (B, L) or None.

        Returns: Output(logits (B, L, V), loss or None). Equivalent to: transformers' BlenderbotForConditionalGeneration.
        """
        if decoder_input_ids is None and labels is None:
            raise ValueError(f"{FN}: give labels, or decoder_input_ids")
        layers.check_ids(FN, "decoder_input_ids", decoder_input_ids, self.config.vocab_size, optional=True)
        layers.check_labels(FN, labels, None if decoder_input_ids is None else decoder_input_ids.shape, self.config.vocab_size, like="decoder_input_ids")
        if decoder_input_ids is None:
            said_before = F.pad(labels[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
            decoder_input_ids = said_before.masked_fill(said_before == layers.IGNORED, self.config.pad_token_id)
        again = self.gradient_checkpointing and self.training
        question, question_mask = self._encode(input_ids, layers.check_valid(FN, attention_mask, *input_ids.shape), again)
        valid = layers.check_valid(FN, decoder_attention_mask, *decoder_input_ids.shape)
        mask = layers.Mask.causal(decoder_input_ids.shape[1], 0, valid, device=input_ids.device)
        logits = self._logits(self.model.decoder(self._embed(decoder_input_ids), mask, 0, None, question, question_mask, again))
        loss = None if labels is None else layers.cross_entropy(logits, labels)
        return layers.Output(logits, loss)

    def _embed(self, ids):
        embedded = self.model.shared(ids)
        return embedded * self.config.d_model**0.5 if self.config.scale_embedding else embedded

    def _encode(self, input_ids, valid, again=False):
        layers.check_ids(FN, "input_ids", input_ids, self.config.vocab_size)
        mask = layers.Mask(None if valid is None else valid[:, None, None], is_causal=False)
        return self.model.encoder(self._embed(input_ids), mask, again=again), mask

    def _logits(self, h):
        return self.lm_head(h) + self.final_logits_bias

    def begin(self, input_ids, valid):
        question, mask = self._encode(input_ids, valid)
        state = ChatState([layer.encoder_attn.keys_values(question) for layer in self.model.decoder.layers], mask)
        return input_ids.new_full((len(input_ids), 1), self.config.decoder_start_token_id), state

    def advance(self, ids, state):
        mask = layers.Mask.causal(ids.shape[1], state.length, None, device=ids.device)
        h = self.model.decoder(self._embed(ids), mask, state.length, state.layers, state.question, state.question_mask)
        state.length += ids.shape[1]
        return self._logits(h[:, -1])
