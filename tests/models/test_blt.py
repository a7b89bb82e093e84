"""BLT: what only it has. Patches, the cached generation against whole texts, rows of unequal length."""
import dataclasses

import pytest
import terrazzo
import torch
from terrazzo.models import Blt

from model_pairs import BLT, ids, pair


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return pair("blt", tmp_path_factory.mktemp("blt"))


def close(a, b, rtol=2e-5):
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


def cut(model, **changes):
    """The same weights, cut otherwise, in float64: no decision hangs on a rounding."""
    again = Blt(dataclasses.replace(model.config, **changes))
    again.load_state_dict(model.state_dict())
    return again.double().eval()


@torch.no_grad()
def uncached(model, tokens, mask, new):
    """Greedy bytes behind right-aligned texts, the whole text computed again for each."""
    for _ in range(new):
        tokens = torch.cat([tokens, model(tokens, attention_mask=mask).logits[:, -1:].argmax(-1)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return tokens


CUTS = [{"patching_threshold": t, "max_patch_length": m} for t in (0.5, 2.2, 2.5, 2.7, 2.9, 3.2, 9.0) for m in (None, 1, 3, 6)]
CUTS += [{"patching_mode": "byte"}, {"local_attention_window_len": None}, {"local_attention_window_len": 1}, {"local_attention_window_len": 2}]


@pytest.mark.parametrize("changes", CUTS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_cached_bytes_are_the_uncached_ones(models, changes):
    """Thousands of prompts in all, of unequal lengths in one batch."""
    model = cut(models[0], **changes)
    generator = torch.Generator().manual_seed(sum(map(ord, str(changes))))
    for B, L, new in ((90, 20, 5), (30, 3, 6), (1, 40, 3)):
        tokens = torch.randint(3, 260, (B, L), generator=generator)
        lengths = torch.randint(1, L + 1, (B, 1), generator=generator).clamp(min=L if B == 1 else 1)
        mask = (torch.arange(L) >= L - lengths).long()
        tokens = tokens * mask
        found = model.generate(tokens, new, attention_mask=mask, eos_token_id=[])
        assert torch.equal(found, uncached(model, tokens, mask, new))


def test_the_texts_differ_by_their_patches(models):
    """The test above would not see a global model that is never run: another cut gives other bytes."""
    tokens = ids(64, 20, 260)
    one, other = (cut(models[0], patching_threshold=t).generate(tokens, 10, eos_token_id=[]) for t in (2.2, 9.0))
    assert (one != other).any(1).float().mean() > 0.5


def test_the_global_model_runs_where_patches_close(models):
    model, tokens, runs = cut(models[0], patching_threshold=2.9), ids(1, 30, 260), []
    hook = model.model.global_transformer.register_forward_hook(lambda module, args, output: runs.append(output.shape[1]))
    text = model.generate(tokens, 40, eos_token_id=[])[:, :-1]
    hook.remove()
    closed = model.model._cut(text, None)[2]
    assert sum(runs) == closed and len(runs) <= 1 + closed and 5 < closed < 60


@pytest.mark.parametrize("pieces", [(40,), (1,) * 40, (7, 1, 1, 5, 1, 25), (2, 38)], ids=str)
def test_in_pieces(models, pieces):
    model, tokens = models[0], ids(2, 40, 260)
    with torch.no_grad():
        whole, state = model(tokens).logits, model.new_state()
        close(torch.cat([model(part, state=state).logits for part in tokens.split(pieces, 1)], 1), whole)
    assert state.length == 40 and state.pasts["local_encoder"].kept[0][0].shape[2] == min(9, 40) + 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("changes", [{}, {"max_patch_length": 3}, {"patching_mode": "byte"}], ids=str)
def test_padded_rows_are_texts_alone(models, side, changes):
    model, tokens = cut(models[0], **changes), ids(3, 30, 260)
    mask = torch.ones(3, 30, dtype=torch.long)
    hidden = slice(0, 11) if side == "left" else slice(19, 30)
    mask[1, hidden] = 0
    labels = tokens.masked_fill(mask.cumsum(1) <= 1, -100) if side == "left" else tokens.masked_fill(mask == 0, -100)
    with torch.no_grad():
        found = model(tokens, labels=labels, attention_mask=mask)
        alone = model(tokens[1:2, mask[1].bool()])
        torch.testing.assert_close(found.logits[1:2, mask[1].bool()], alone.logits)
        torch.testing.assert_close(found.logits[::2], model(tokens[::2]).logits)
    losses = [torch.nn.functional.cross_entropy(logits[:-1], text[1:], reduction="sum") for logits, text in
              ((found.logits[r, mask[r].bool()].float(), tokens[r, mask[r].bool()]) for r in range(3))]  # fmt: skip
    torch.testing.assert_close(found.loss, sum(losses) / (mask.sum() - 3))


def test_patches_given_by_the_caller(models):
    ours, theirs = models
    tokens = ids(2, 12, 260)
    for lengths in ([[1, 3, 4, 4], [1, 1, 9, 1]], [[1, 3, 8, 0], [1, 1, 9, 1]], [[1, 11, 0], [1, 3, 8]], [[12], [12]], [[1, 3, 8, -0, 0], [1, 3, 8, 0, 0]]):
        lengths = torch.tensor(lengths)
        with torch.no_grad():
            found, expected = ours(tokens, patch_lengths=lengths).logits, theirs(tokens, patch_lengths=lengths, use_cache=False).logits
        # two zeros behind a row's patches: transformers lets the last byte ask an empty patch, the average of all bytes
        close(found[:, :-1] if lengths.shape[1] == 5 else found, expected[:, :-1] if lengths.shape[1] == 5 else expected)


def test_what_the_patcher_gives_transformers_is_taken(models):
    ours, theirs = models
    tokens = ids(3, 25, 260)
    with torch.no_grad():
        lengths = theirs.model.patcher(tokens, patch_size=4, threshold=2.8)[1]
        assert bool((lengths[:, -1] < 0).any())  # rows with fewer patches end in -1 there
        close(ours(tokens, patch_lengths=lengths).logits, ours(tokens).logits)


@pytest.mark.parametrize("changes", [{"max_patch_length": 3}, {"max_patch_length": 5, "patching_threshold": 9.0}, {"patch_size": None}], ids=str)
def test_the_last_byte_in_transformers(changes, tmp_path):
    """It forgets there that the byte behind may start a patch: the logits of a byte change when another follows. Ours never do."""
    ours, theirs = pair("blt", tmp_path, **changes)
    changed = 0
    for length in range(9, 25):
        tokens = ids(1, length + 1, 260)
        with torch.no_grad():
            whole, part = (ours(t).logits for t in (tokens, tokens[:, :-1]))
            expected, shorter = (theirs(t, use_cache=False).logits for t in (tokens, tokens[:, :-1]))
        close(whole[:, :-1], expected[:, :-1])
        close(part, whole[:, :-1])
        changed += not torch.allclose(shorter[:, -1], expected[:, -2], rtol=1e-3)
    assert changed > 0


def test_bfloat16(models, tmp_path):
    """As near to the float32 model as transformers' own bfloat16 is, twice that at most, with the same patches."""
    exact, theirs = models
    exact.save_pretrained(tmp_path)
    ours, tokens = Blt.from_pretrained(tmp_path, dtype=torch.bfloat16), ids(2, 40, 260)
    with torch.no_grad():
        lengths = torch.tensor([[1, 4, 8, 2, 5, 12, 8, 0], [1, 1, 1, 30, 3, 3, 1, 0]])
        truth = exact(tokens, patch_lengths=lengths).logits
        expected = type(theirs).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()(tokens, patch_lengths=lengths, use_cache=False).logits
        error = (ours(tokens, patch_lengths=lengths).logits - truth).norm()
    assert error <= 2 * (expected.float() - truth).norm()


def test_compiles_whole_with_given_patches(models):
    model, tokens, lengths = models[0], ids(2, 12, 260), torch.tensor([[1, 3, 4, 4], [1, 1, 9, 1]])
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(compiled(tokens, patch_lengths=lengths).logits, model(tokens, patch_lengths=lengths).logits)
        close(torch.compile(model, backend="aot_eager")(tokens).logits, model(tokens).logits)  # one break: how many patches there are


@pytest.mark.parametrize("part", ["encoder_config", "decoder_config", "global_config"])
def test_dropout(part, tmp_path):
    ours, theirs = pair("blt", tmp_path, **{part: BLT[part] | {"dropout": 0.2}})
    tokens = ids(2, 30, 260)
    with torch.no_grad():
        plain = ours(tokens).logits
        ours.train()
        runs = torch.stack([ours(tokens).logits for _ in range(40)])
        assert not torch.equal(runs[0], runs[1])
        theirs.train()
        spread = torch.stack([theirs(tokens, use_cache=False).logits for _ in range(40)]).std(0).mean()
        for stack in (ours.model.local_encoder, ours.model.local_decoder, ours.model.global_transformer):  # the dense way that dropout takes, without it
            for module in stack.modules():
                if getattr(module, "dropout", 0):
                    module.dropout = 1e-12
        close(ours(tokens).logits, plain)
    assert 0.9 < (runs.std(0).mean() / spread).item() < 1.1


def test_the_kernels_ran(models):
    terrazzo.reset_counters()
    with torch.no_grad():
        models[0](ids(1, 20, 260))
    for op in ("byte_hash_embedding", "local_attention", "patch_reduce", "patch_cross_attention", "entropy_patch", "rmsnorm_gated"):
        assert set(terrazzo.counters()[op]) == {"cpu"}, op


@pytest.mark.parametrize("kwargs, message", [
    ({"input_ids": torch.full((1, 3), 260)}, "must lie in 0 to 259, got 260"), ({"attention_mask": torch.ones(1, 2)}, r"attention_mask must be"),
    ({"attention_mask": torch.tensor([[1, 0, 1]])}, "a single run of bytes in every row"), ({"attention_mask": torch.tensor([[0, 0, 0]])}, "a single run of bytes"),
    ({"patch_lengths": torch.tensor([[1, 3]])}, "must sum to L = 3"), ({"patch_lengths": torch.tensor([[4, -2, 1]])}, "lengths must"),
    ({"patch_lengths": torch.tensor([3])}, r"patch_lengths must be \(B, S\)"), ({"patch_lengths": torch.tensor([[1.0, 2.0]])}, "lengths must"),
])  # fmt: skip
def test_bad_input(models, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        models[0](**{"input_ids": torch.ones(1, 3, dtype=torch.long)} | kwargs)


def test_patch_lengths_excludes_a_state(models):
    with pytest.raises(ValueError, match="patch_lengths goes without state"):
        models[0](ids(1, 3), patch_lengths=torch.tensor([[1, 2]]), state=models[0].new_state())


@pytest.mark.parametrize("changes, message", [
    ({"encoder_config": BLT["encoder_config"] | {"hidden_size": 64}}, "the same hidden_size, got 64 and 32"), ({"patching_threshold": None}, "must be a number of nats"),
    ({"decoder_config": BLT["decoder_config"] | {"hidden_size_global": 64}}, "hidden_size_global of decoder_config must be"),
    ({"encoder_config": BLT["encoder_config"] | {"cross_attn_k": 3}}, "cross_attn_k must be the same"),
    ({"global_config": BLT["global_config"] | {"num_attention_heads": 5}}, "heads of an even size"),
    ({"decoder_config": BLT["decoder_config"] | {"hidden_act": "tanhshrink"}}, "hidden_act must be one of"),
    ({"global_config": BLT["global_config"] | {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type must be 'default'"),
])  # fmt: skip
def test_bad_config(changes, message):
    from terrazzo.models import BltConfig

    with pytest.raises(ValueError, match=message):
        BltConfig.from_hf(BLT | changes)


def test_older_spellings():
    """rope_theta beside an empty rope_scaling, as in checkpoints of transformers 4."""
    from terrazzo.models import BltConfig

    old = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "default"}, "head_dim": 8}
    config = BltConfig.from_hf(BLT | {name: BLT[name] | old | {"rope_theta": theta} for name, theta in
                                      (("encoder_config", 7.0), ("global_config", 8.0), ("patcher_config", 9.0))})  # fmt: skip
    assert (config.encoder.rope_theta, config.global_.rope_theta, config.patcher.rope_theta, config.decoder.rope_theta) == (7.0, 8.0, 9.0, 500000.0)
    assert BltConfig.from_hf({}) == BltConfig() and BltConfig().global_.num_hidden_layers == 25 and BltConfig().encoder.intermediate_size == 2730
