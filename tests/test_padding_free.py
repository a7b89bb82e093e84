"""Padding-free training with transformers' own collator: the loss and gradients of the unpacked examples."""
import json
import subprocess
import sys

import pytest
import terrazzo
import torch
from tiny_models import make_model, tokens

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

LENGTHS = (7, 19, 1, 5, 33)
# Types whose seq_idx transformers 5.23 hands down to every mixer, and whose mixers all take it (inkling drops it on
# the way, Mamba-1 scans and the delta rule don't take it).
PACKABLE = ["bamba", "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "lfm3", "mamba2", "nemotron_h", "zamba2"]
WIDE = {"lfm3": dict(conv_L_cache=7)}  # seven taps: the reference backend keeps the sequences apart


def examples():
    return [tokens(1, length, seed=10 + i)[0].tolist() for i, length in enumerate(LENGTHS)]


def packed_batch():
    collator = transformers.DataCollatorWithFlattening(return_tensors="pt", return_seq_idx=True, return_flash_attn_kwargs=True)
    return collator([{"input_ids": ids} for ids in examples()])


def block_diagonal_mask():
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = (sequence[:, None] == sequence).tril()
    return torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def loss_of(model, batch):
    """The model's loss on a batch, around two faults of transformers 5.23 that have nothing to do with the kernels."""
    batch = dict(batch)
    if model.config.model_type == "mamba2":  # Mamba2ForCausalLM doesn't hand seq_idx to its backbone
        labels = batch.pop("labels")
        logits = model.lm_head(model.backbone(**batch, use_cache=False)[0])
        return model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size)
    if model.config.model_type == "granitemoehybrid" and "position_ids" in batch:
        # Its attention mask ignores position_ids: pass the mask itself.
        batch["attention_mask"] = {"full_attention": block_diagonal_mask(), "linear_attention": None}
    return model(**batch, use_cache=False).loss


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def unpacked_training_step(model):
    """The examples one by one, weighted as the packed batch weighs them: a mean over all predicted tokens."""
    model.zero_grad()
    total = sum(len(ids) - 1 for ids in examples())
    loss = 0.0
    for ids in examples():
        if len(ids) > 1:
            ids = torch.tensor([ids])
            part = loss_of(model, dict(input_ids=ids, labels=ids)) * (ids.shape[1] - 1) / total
            part.backward()
            loss += part.item()
    return loss, gradients(model)


def packed_training_step(model, **changes):
    model.zero_grad()
    loss = loss_of(model, packed_batch() | changes)
    loss.backward()
    return loss.item(), gradients(model)


def differences(got, want):
    """Relative difference of the loss, and the largest of any gradient against the largest gradient."""
    largest = max(g.abs().max().item() for g in want[1].values())
    zero = torch.zeros(())
    gradient = max((got[1].get(name, zero) - g).abs().max().item() for name, g in want[1].items())
    return abs(got[0] - want[0]) / abs(want[0]), gradient / largest


@pytest.mark.parametrize("model_type", PACKABLE)
def test_packed_training_equals_the_examples_alone(model_type):
    model = make_model(model_type, **WIDE.get(model_type, {})).train()
    want = unpacked_training_step(model)
    with terrazzo.patch(model):
        loss, gradient = differences(packed_training_step(model), want)
        assert loss < 1e-5 and gradient < 1e-4
        # Negative control: without seq_idx the sequences run into each other.
        loss, gradient = differences(packed_training_step(model, seq_idx=None), want)
        assert gradient > 1e-3


@pytest.mark.parametrize("model_type", ["bamba", "mamba2", "lfm2"])
def test_transformers_alone_refuses(model_type):
    model = make_model(model_type).train()
    with pytest.raises(ValueError, match="packed sequences"):
        packed_training_step(model)
    with terrazzo.patch(model):
        packed_training_step(model)
    with pytest.raises(ValueError, match="packed sequences"):
        packed_training_step(model)


COMPAT = """
import json, sys
sys.path.insert(0, {tests!r})
import terrazzo.compat
terrazzo.compat.install()
import terrazzo, torch
from test_padding_free import differences, make_model, packed_training_step, unpacked_training_step

result = {{}}
for model_type in {types!r}:
    model = make_model(model_type).train()
    want = unpacked_training_step(model)
    terrazzo.reset_counters()
    result[model_type] = differences(packed_training_step(model), want), terrazzo.counters()
print(json.dumps(result))
"""


def test_after_compat_install_in_a_fresh_process(request):
    """transformers binds the functions when a modeling file is imported, so this needs a process of its own."""
    types = ["bamba", "mamba2", "lfm2"]
    script = COMPAT.format(tests=str(request.path.parent), types=types)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    for model_type in types:
        (loss, gradient), counters = result[model_type]
        assert loss < 1e-5 and gradient < 1e-4
        assert counters["causal_conv1d_fn"]["cpu"] and counters["causal_conv1d_fn_bwd"]["cpu"]
        if model_type != "lfm2":
            assert counters["mamba_chunk_scan_combined"]["cpu"] and counters["mamba_chunk_scan_combined_bwd"]["cpu"]
