"""Sizes and settings of a BLT."""
from dataclasses import asdict, dataclass, field

from . import layers, loading
from .byte_layers import check_heads
from .entropy_model import EntropyConfig

FN = "terrazzo.Blt"


@dataclass
class StackConfig:
    """Of the encoder, the decoder or the global model, by transformers' names."""

    hidden_size: int = 1024
    num_hidden_layers: int = 1
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None  # None: 8/3 of hidden_size
    cross_attn_all_layers: bool = False
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    dropout: float = 0.0
    max_position_embeddings: int = 24576  # told to others; nothing here depends on it

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.intermediate_size = self.intermediate_size or int(8 * self.hidden_size / 3)
        check_heads(FN, self)

    @classmethod
    def of(cls, name, config):
        """From the dict of the encoder_config, decoder_config or global_config of a config.json."""
        known = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        return cls(**DEFAULTS[name] | known | {"rope_theta": loading.rope_theta(FN, config, cls.rope_theta)})

    def to_hf(self, kind, **more):
        config = asdict(self) | more
        return {"model_type": f"blt_{kind}", "rope_parameters": {"rope_type": "default", "rope_theta": config.pop("rope_theta")}} | config


DEFAULTS = {
    "encoder": {},
    "decoder": dict(num_hidden_layers=9, intermediate_size=2816, cross_attn_all_layers=True),
    "global": dict(hidden_size=2048, num_hidden_layers=25, intermediate_size=5632, max_position_embeddings=4096),
}


@dataclass
class BltConfig:
    """By transformers' names; encoder, decoder, global_ and patcher are its *_config."""

    vocab_size: int = 260
    patch_in_forward: bool = True
    patching_mode: str = "entropy"            # any other: every byte is a patch, as in transformers
    patch_size: float | None = 4              # None: every byte is a patch
    patching_threshold: float | None = 1.335442066192627  # nats
    max_patch_length: int | None = None
    local_attention_window_len: int | None = 512
    cross_attn_k: int = 2
    encoder_hash_byte_group_size: tuple = (3, 4, 5, 6, 7, 8)
    encoder_hash_byte_group_vocab: int = 500002
    encoder_hash_byte_group_nb_functions: int = 1
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    encoder: StackConfig = field(default_factory=lambda: StackConfig.of("encoder", {}))
    decoder: StackConfig = field(default_factory=lambda: StackConfig.of("decoder", {}))
    global_: StackConfig = field(default_factory=lambda: StackConfig.of("global", {}))
    patcher: EntropyConfig = field(default_factory=EntropyConfig)

    def __post_init__(self):
        self.encoder_hash_byte_group_size = tuple(self.encoder_hash_byte_group_size or (3, 4, 5, 6, 7, 8))
        if self.encoder.hidden_size != self.decoder.hidden_size:
            raise ValueError(f"{FN}: encoder and decoder must have the same hidden_size, got {self.encoder.hidden_size} and {self.decoder.hidden_size}")
        if self.cuts_by_entropy and self.patching_threshold is None:
            raise ValueError(f"{FN}: patching_threshold must be a number of nats with patching_mode 'entropy', got None")
        for config in (self.encoder, self.decoder, self.global_):
            layers.activation(FN, config.hidden_act)

    @property
    def cuts_by_entropy(self):
        return self.patch_in_forward and self.patching_mode == "entropy" and self.patch_size is not None

    @classmethod
    def from_hf(cls, config):
        """From the dict of a config.json."""
        parts = {name: config.get(f"{name}_config") or {} for name in (*DEFAULTS, "patcher")}
        known = {name: config[name] for name in cls.__dataclass_fields__ if name in config and not isinstance(config[name], dict)}
        for name, part in parts.items():
            if part.get("cross_attn_k", config.get("cross_attn_k", cls.cross_attn_k)) != config.get("cross_attn_k", cls.cross_attn_k):
                raise ValueError(f"{FN}: cross_attn_k must be the same in {name}_config as outside, got {part['cross_attn_k']}")
        stacks = {name: StackConfig.of(name, parts[name]) for name in DEFAULTS}
        width = parts["decoder"].get("hidden_size_global", stacks["global"].hidden_size)
        if width != stacks["global"].hidden_size:
            raise ValueError(f"{FN}: hidden_size_global of decoder_config must be global_config's hidden_size {stacks['global'].hidden_size}, got {width}")
        return cls(**known, encoder=stacks["encoder"], decoder=stacks["decoder"], global_=stacks["global"], patcher=EntropyConfig.from_hf(parts["patcher"]))

    def to_hf(self):
        config = {name: value for name, value in vars(self).items() if name not in ("encoder", "decoder", "global_", "patcher")}
        local = {"cross_attn_k": self.cross_attn_k, "hidden_size_global": self.global_.hidden_size, "vocab_size": self.vocab_size}
        config["encoder_hash_byte_group_size"] = list(self.encoder_hash_byte_group_size)
        parts = {"encoder_config": self.encoder.to_hf("local_encoder", **local), "decoder_config": self.decoder.to_hf("local_decoder", **local),
                 "global_config": self.global_.to_hf("global_transformer"), "patcher_config": self.patcher.to_hf()}  # fmt: skip
        return {"model_type": "blt", "architectures": ["BltForCausalLM"]} | config | parts
