"""Model rows: one Bamba block inside Hugging Face's own model, as it is and patched.

Prefill, one decoding step and one training step. The logits (or the loss and a gradient) of the patched model
must equal those of the untouched one; nothing is faster that computes something else.
"""
import torch

import terrazzo

from .cases import NO_TRANSFORMERS, Case, Provider, Unavailable, compiled, generator, mamba2_parameters
from .roofline import Work

VOCAB, PROMPT = 260, 16
# Made by hand: transformers' own mask code cannot handle a cache without any attention layer.
NO_MASKS = {"full_attention": None, "linear_attention": None}
NMSE_LIMIT = 1e-8
# The parameter whose gradient a training step is judged by: all layers stand between it and the loss.
WATCHED = ("mamba.in_proj.weight", "wte.weight", "local_encoder.embed_tokens.weight", "model.shared.weight")
# preset -> (hidden size, length); the MLP is 3.5 x hidden and heads are 64 wide, as in Bamba-9B
SIZES = {"bamba-9b": (1024, 1024), "tiny": (64, 24)}


def _config(hidden):
    from transformers import BambaConfig

    return BambaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=1, attn_layer_indices=[],
        num_attention_heads=max(1, hidden // 64), num_key_value_heads=1, mamba_n_heads=hidden * 2 // 64, mamba_d_head=64,
        mamba_n_groups=1, mamba_d_state=128, mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=256,
    )  # fmt: skip


def _model(hidden, patched):
    try:
        from transformers import BambaForCausalLM
    except ImportError as error:
        raise Unavailable(NO_TRANSFORMERS) from error
    before = torch.random.get_rng_state()
    torch.manual_seed(7)
    model = with_mamba2_parameters(BambaForCausalLM(_config(hidden)).eval())
    torch.random.set_rng_state(before)
    model = model.to(torch.get_default_device())
    if patched:
        terrazzo.patch(model)
    return model


@torch.no_grad()
def with_mamba2_parameters(model):
    """The model with decay rates and steps as Mamba-2 initialises them."""
    for module in model.modules():
        if hasattr(module, "A_log"):
            A, dt_bias = mamba2_parameters(module.num_heads)
            module.A_log.copy_(torch.log(-A))
            module.dt_bias.copy_(dt_bias)
    return model


def _prefill(hidden, patched):
    model = _model(hidden, patched)
    return lambda input_ids: model(input_ids, use_cache=False).logits


def cached_step(model, **masks):
    """One token after another against a cache that the first call fills with a short prompt."""
    cache, seen = None, PROMPT

    def step(input_ids):
        nonlocal cache, seen
        if cache is None:
            cache = model(torch.arange(PROMPT, device=input_ids.device)[None] % VOCAB, use_cache=True, **masks).past_key_values
        position = torch.tensor([[seen]], device=input_ids.device)
        seen += 1
        return model(input_ids, past_key_values=cache, position_ids=position, use_cache=True, **masks).logits

    return step


def training_step(model, **options):
    """Forward, backward and an AdamW step; the learning rate is 0, so that every step does the same work."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    watched = next(p for name, p in model.named_parameters() if name.endswith(WATCHED))

    def step(input_ids):
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=False)
            loss = model(input_ids, labels=input_ids, **options).loss
            loss.backward()
            optimizer.step()
        return loss.detach(), watched.grad

    return step


def _decode(hidden, patched):
    return cached_step(_model(hidden, patched), attention_mask=NO_MASKS)


def _train(hidden, patched):
    return training_step(_model(hidden, patched), use_cache=False)


def _multiply_adds(hidden):
    """Of one token in the dense layers: in_proj, out_proj, the MLP and the head."""
    inner = 2 * hidden
    return hidden * (2 * inner + 2 * 128 + inner // 64) + inner * hidden + 3 * hidden * (hidden * 7 // 2) + hidden * VOCAB


def cases(preset):
    hidden, L = SIZES[preset]
    scan = 2 * hidden * 128
    weights = 4 * _multiply_adds(hidden)
    jobs = (
        ("prefill", _prefill, L, Work(2 * L * (_multiply_adds(hidden) + 2 * scan), weights, "read")),
        ("decode", _decode, 1, Work(2 * (_multiply_adds(hidden) + 2 * scan), weights + 8 * scan, "read")),
        ("training step", _train, L, Work(L * (6 * _multiply_adds(hidden) + 14 * scan), 10 * weights, "read")),
    )
    found = []
    for job, build, length, work in jobs:

        def inputs(seed, length=length):
            return {"input_ids": torch.randint(0, VOCAB, (1, length), generator=generator(seed))}

        def provider(patched, build=build):
            return lambda: build(hidden, patched)

        providers = [Provider("terrazzo", provider(True), ours=True), Provider("hf", provider(False))]
        if job == "prefill":
            providers.append(Provider("hf-compiled", compiled(provider(False))))
        found.append(Case("bamba_block", f"{job} 1x{length} hidden {hidden}", "model", "fp32", work, inputs, tuple(providers),
                          provider(False), nmse_limit=NMSE_LIMIT, tokens=length))
    return found

