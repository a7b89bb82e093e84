"""terrazzo.patch on transformers' BLT: logits and gradients, no mask of bytes x patches, the cache, and what stays with transformers."""
import copy
import logging

import pytest
import terrazzo
import torch
from terrazzo import adapters_blt, dispatch
from test_patch import LOGITS, expected_ops, far, far_gradients, loss_and_gradients, ops_that_ran, run
from tiny_models import BLT_LOCAL, BLT_PART, VOCAB, make_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

transformers = pytest.importorskip("transformers")
from transformers.models.blt import modeling_blt as modeling  # noqa: E402

OPS = expected_ops("blt")
IDS = {"patch_lengths_from_entropies", "patch_ids_from_lengths"}
ALL_LAYERS = BLT_LOCAL | dict(cross_attn_all_layers=True)
ONE_LAYER = BLT_LOCAL | dict(cross_attn_all_layers=False)
# options of the model -> the ops that then have nothing to do
VARIANTS = {
    "as it is": ({}, set()),
    "max_patch_length": (dict(max_patch_length=3), set()),
    "no patcher": (dict(patch_in_forward=False), {"patch_lengths_from_entropies"}),
    "no patcher, max_patch_length": (dict(patch_in_forward=False, max_patch_length=1), {"patch_lengths_from_entropies"}),
    "another mode": (dict(patching_mode="bytes"), {"patch_lengths_from_entropies"}),
    "lengths in floating point": (dict(later=dict(patch_size=None)), IDS),
    "an endless patch": (dict(patching_threshold=float("inf")), {"patch_lengths_from_entropies"}),
    "cross-attention in every layer": (dict(encoder_config=ALL_LAYERS, decoder_config=ALL_LAYERS), set()),
    "cross-attention in one layer": (dict(encoder_config=ONE_LAYER, decoder_config=ONE_LAYER), set()),
    "a projection before the global transformer": (dict(
        encoder_config=BLT_LOCAL | dict(hidden_size_global=48), decoder_config=BLT_LOCAL | dict(hidden_size_global=48),
        global_config=BLT_PART | dict(hidden_size=48)), set()),
    "three rows a patch": (dict(cross_attn_k=3, encoder_config=BLT_LOCAL | dict(cross_attn_k=3), decoder_config=BLT_LOCAL | dict(cross_attn_k=3)), set()),
    "two hash functions": (dict(encoder_hash_byte_group_nb_functions=2, encoder_hash_byte_group_size=[2, 9]), set()),
    "a window in the patcher alone": (dict(later=dict(local_attention_window_len=None)), set()),
    "no window": (dict(patch_in_forward=False, later=dict(local_attention_window_len=None)), {"local_attention", "patch_lengths_from_entropies"}),
    "a window of two": (dict(local_attention_window_len=2), set()),
    "eager": (dict(attn_implementation="eager"), set()),
}  # fmt: skip


def blt(dtype=torch.float32, attn_implementation=None, later=None, **options):
    """`later`: options that are read at each call, for values of None, which make_model would drop."""
    model = make_model("blt", dtype, **options)
    for name, value in (later or {}).items():
        setattr(model.config, name, value)
    if attn_implementation:
        model.set_attn_implementation(attn_implementation)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients(name):
    options, idle = VARIANTS[name]
    model, ids = blt(**options).train(), tokens(3, 41)
    with torch.no_grad():
        want = run(model, ids)
    want_loss, want_gradients = loss_and_gradients(model, ids)
    terrazzo.reset_counters()
    with terrazzo.patch(model):
        with torch.no_grad():
            assert not far(run(model, ids), want, LOGITS)
        loss, gradients = loss_and_gradients(model, ids)
    assert not far(loss, want_loss, 1e-4) and not far_gradients(gradients, want_gradients)
    trained = OPS - idle - IDS - ({"local_attention"} if "window in the patcher alone" in name else set())
    assert ops_that_ran() == (OPS - idle) | {op + "_bwd" for op in trained}
    with torch.no_grad():
        assert torch.equal(run(model, ids), want)


def test_rows_have_different_numbers_of_patches():
    """transformers ends the shorter rows in zeros and -1; the variants above are run on such a batch."""
    model = blt()
    _, lengths, _ = model.model.patcher(tokens(3, 41), patch_size=4, threshold=model.config.patching_threshold)
    assert lengths.min() == -1 and (lengths == 0).any() and lengths.max() > 3


EMPTY = {
    "behind the last": [[1, 1, 30, 8, 0, 0, 0], [1, 1, 2, 9, 7, 11, 9], [20, 11, 5, 4, 0, 0, 0]],
    "between and in front": [[1, 1, 0, 0, 30, 8, 0], [0, 4, 4, 0, 12, 20, 0], [20, 0, 20, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", EMPTY)
def test_patches_without_bytes(name, attention):
    """transformers' mask lets them see every byte, and the last byte of a row reads one."""
    model, ids, lengths = blt(attn_implementation=attention), tokens(3, 40), torch.tensor(EMPTY[name])
    with torch.no_grad():
        logits = run(model, ids, patch_lengths=lengths)
    want_loss, want = loss_and_gradients(model, ids, patch_lengths=lengths)
    with terrazzo.patch(model):
        with torch.no_grad():
            assert not far(run(model, ids, patch_lengths=lengths), logits, LOGITS)
        loss, got = loss_and_gradients(model, ids, patch_lengths=lengths)
    assert not far(loss, want_loss, 1e-4)
    if attention == "eager":  # the backward of sdpa takes each weight of such a row for 1: log(bytes) is lost beside the mask's large number
        assert not far_gradients(got, want)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("max_patch_length", [None, 2])
def test_short_texts(length, max_patch_length):
    model, ids = blt(max_patch_length=max_patch_length), tokens(2, length)
    with torch.no_grad():
        want = run(model, ids)
        with terrazzo.patch(model):
            assert not far(run(model, ids), want, LOGITS)


def test_float64():
    """What differs is float32 rounding of transformers' own norms and rotations, a few millionths at most."""
    model, ids = blt(torch.float64), tokens(3, 60)
    want_loss, want = loss_and_gradients(model, ids)
    with terrazzo.patch(model):
        loss, got = loss_and_gradients(model, ids)
    assert not far(loss, want_loss, 1e-6)
    for name in want:
        assert not far(got[name], want[name], 1e-5), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    """Judged by the error to the float32 model, transformers' own being the yardstick, on the same patches."""
    model, ids = blt(dtype, patch_in_forward=True), tokens(3, 60)
    lengths = torch.tensor([[1, 1, 4, 9, 3] * 3 + [6, 0, 0], [1, 1] + [5] * 11 + [1, 1, 1, 0, 0], [1, 2, 3] * 6])[:, :18]
    lengths[2, -1] += 60 - lengths[2].sum()
    with torch.no_grad():
        exact = run(copy.deepcopy(model).float(), ids, patch_lengths=lengths)
        theirs = run(model, ids, patch_lengths=lengths)
        with terrazzo.patch(model, backend="cpu") as handle:
            terrazzo.reset_counters()
            ours = run(model, ids, patch_lengths=lengths)
    error = lambda out: (out.float() - exact).square().mean().sqrt().item()
    assert ours.dtype == theirs.dtype and error(ours) <= 1.25 * error(theirs)
    assert ops_that_ran() == OPS - {"patch_lengths_from_entropies"} | {"linear"}
    assert {row.backend for row in handle.report() if row.op == "linear"} == {"cpu"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(attention, side):
    model, ids = blt(attn_implementation=attention), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, slice(None, 13) if side == "left" else slice(-13, None)] = 0
    want_loss, want = loss_and_gradients(model, ids, attention_mask=mask)
    with torch.no_grad():
        logits = run(model, ids, attention_mask=mask)
    with terrazzo.patch(model):
        with torch.no_grad():
            got = run(model, ids, attention_mask=mask)
            alone = run(model, ids[:1, :-13])
        loss, gradients = loss_and_gradients(model, ids, attention_mask=mask)
    assert not far(got[mask.bool()], logits[mask.bool()], LOGITS)
    if side == "right":
        assert not far(got[:1, :-13], alone, LOGITS)
    if attention == "eager":  # bytes that see nothing average everything there, and such batches stay with transformers
        assert not far(loss, want_loss, 1e-4) and not far_gradients(gradients, want)


# ---- linear in the bytes -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest number of elements that any operator, of the backward too, returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        self.elements = max([self.elements, *(t.untyped_storage().nbytes() // t.itemsize for t in tree_leaves(found) if isinstance(t, torch.Tensor))])
        return found


def test_nothing_of_bytes_times_patches():
    model, L = blt(), 700
    ids = tokens(1, L)
    _, lengths, _ = model.model.patcher(ids, patch_size=4, threshold=model.config.patching_threshold)
    squares = L * lengths.shape[1]
    assert lengths.shape[1] > 200
    with Largest() as theirs:
        loss_and_gradients(model, ids)
    assert theirs.elements >= squares
    with terrazzo.patch(model), Largest() as ours:
        loss_and_gradients(model, ids)
    assert ours.elements <= max(L * VOCAB, model.model.encoder_hash_tok_embedding.weight.numel()) < squares / 3


# ---- the cache -----------------------------------------------------------------------------------------------


def test_the_default_cache_is_left_out(caplog):
    """BltConfig's default use_cache fails in transformers: its DynamicCache asks for a number of layers that BltConfig hasn't."""
    model, ids = blt(use_cache=True), tokens(2, 20)
    with torch.no_grad():
        want = run(model, ids, use_cache=False)
        continued = model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=False)
        dispatch._logged.clear()
        with terrazzo.patch(model) as handle, caplog.at_level(logging.WARNING, "terrazzo"):
            for options in ({}, dict(use_cache=True), dict(use_cache=False)):
                output = model(ids, **options)
                assert not far(output.logits, want, LOGITS) and output.past_key_values is None
            for options in ({}, dict(use_cache=True), dict(num_beams=1)):
                assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False, **options), continued)
            assert "decodes wrong bytes" in caplog.text and len(caplog.records) == 1
            with pytest.raises(ValueError, match="past_key_values must be None, got DynamicCache: .*pass the whole text each time"):
                model(ids, past_key_values=transformers.DynamicCache())
            with pytest.raises(ValueError, match="past_key_values must be None, got DynamicCache"):
                model.generate(ids, past_key_values=transformers.DynamicCache())
    rows = [row for row in handle.report() if row.op == "use_cache"]
    assert {row.module for row in rows} == {"BltForCausalLM", "model"} and {row.backend for row in rows} == {"without"}
    assert "wrong bytes" in rows[0].note


def test_generation_by_class_and_with_beams():
    model, ids = blt(use_cache=True), tokens(1, 15)
    options = dict(max_new_tokens=6, do_sample=False, num_beams=3)
    want = model.generate(ids, use_cache=False, **options)
    with terrazzo.patch("blt"):
        assert "generate" in vars(modeling.BltForCausalLM)
        assert torch.equal(model.generate(ids, **options), want)
    assert "generate" not in vars(modeling.BltForCausalLM)


# ---- scopes --------------------------------------------------------------------------------------------------


def test_class_scope_puts_the_very_same_objects_back():
    names = ["compute_hash_embeddings", "create_sliding_window_causal_mask", "_prepare_patch_cross_attention_mask"]
    places = [(modeling, name) for name in names] + [
        (modeling.BltPatcher, "patch_lengths_from_entropies"), (modeling.BltLocalEncoder, "patch_reduce"), (modeling.BltModel, "forward"),
        (modeling.BltModel, "_patch_ids_from_lengths"), (modeling.BltSelfAttention, "forward"), (modeling.BltCrossAttention, "forward"),
    ]  # fmt: skip
    before = [vars(owner)[name] for owner, name in places]
    first, second = terrazzo.patch("blt"), terrazzo.patch("blt", backend="reference")
    changed = [vars(owner)[name] for owner, name in places]
    assert not any(a is b for a, b in zip(before, changed)) and isinstance(changed[3], staticmethod)
    first.undo()
    assert all(vars(owner)[name] is value for (owner, name), value in zip(places, changed))  # the later patch still holds
    second.undo()
    assert all(vars(owner)[name] is value for (owner, name), value in zip(places, before))


@pytest.mark.parametrize("class_first", [True, False])
def test_scopes_overlap(class_first):
    model, ids = blt(), tokens(1, 30)
    with torch.no_grad():
        want = run(model, ids)
        handles = {scope: terrazzo.patch(model, scope=scope) for scope in (("class", "instance") if class_first else ("instance", "class"))}
        handles["class"].undo()
        terrazzo.reset_counters()
        assert not far(run(model, ids), want, LOGITS)
        assert ops_that_ran() == OPS
        handles["instance"].undo()
        assert torch.equal(run(model, ids), want)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_forced_backend(backend):
    model, ids = blt(), tokens(3, 41)
    with torch.no_grad():
        want = run(model, ids)
        with terrazzo.patch(model, ops=sorted(OPS), backend=backend):
            terrazzo.reset_counters()
            assert not far(run(model, ids), want, LOGITS)
    assert ops_that_ran(backend) == OPS == set(terrazzo.counters())


@pytest.mark.parametrize("ops", [*sorted(OPS), "entropy_patch", "patch_attention"])
def test_each_op_alone(ops):
    model, ids = blt(), tokens(3, 41)
    chosen = {"entropy_patch": IDS, "patch_attention": {"patch_reduce", "patch_cross_attention"}}.get(ops, {ops})
    with torch.no_grad():
        want = run(model, ids)
        with terrazzo.patch(model, ops=ops):
            terrazzo.reset_counters()
            assert not far(run(model, ids), want, LOGITS)
    assert ops_that_ran() == chosen


# ---- what stays with transformers ----------------------------------------------------------------------------


def stays(model, ids, without, **options):
    """The patched model on a call that these ops can't serve: the numbers of transformers, by its own code."""
    with torch.no_grad():
        torch.manual_seed(5)
        want = model(ids, **options)
        with terrazzo.patch(model):
            terrazzo.reset_counters()
            torch.manual_seed(5)
            got = model(ids, **options)
        assert not far(got.logits, want.logits, LOGITS)
        assert ops_that_ran() == OPS - without
    return got, want


def test_dropout():
    part = BLT_LOCAL | dict(dropout=0.3)
    model = blt(encoder_config=part, decoder_config=part).train()
    model.model.patcher.eval()
    stays(model, tokens(2, 30), {"patch_cross_attention"})  # the patcher's local attention has none
    stays(model.eval(), tokens(2, 30), set())


@pytest.mark.parametrize("told_by", ["argument", "config"])
def test_returned_attention_weights(told_by):
    model = blt(attn_implementation="eager")
    if told_by == "config":
        model.model.config.output_attentions = True
    options = dict(output_attentions=True) if told_by == "argument" else {}
    got, want = stays(model, tokens(2, 30), {"local_attention", "patch_cross_attention"}, **options)
    assert len(got.attentions) == len(want.attentions) == 4 and all(not far(a, b, LOGITS) for a, b in zip(got.attentions, want.attentions))


def test_hidden_states_of_bytes():
    model, ids = blt(), tokens(1, 30)
    with torch.no_grad():
        want = model(ids, output_hidden_states=True).hidden_states
        with terrazzo.patch(model):
            got = model(ids, output_hidden_states=True).hidden_states
    assert len(got) == len(want) > 4
    assert all(not far(a, b, LOGITS) for a, b in zip(got, want))


def test_positions_that_start_again_and_masks_made_by_hand():
    model, ids = blt(), tokens(1, 30)
    got, _ = stays(model, ids, set(), position_ids=torch.arange(30)[None] % 17)  # the patcher alone keeps its window
    assert terrazzo.counters()["local_attention"]["cpu"] == 2
    seen = torch.ones(30, 30, dtype=torch.bool).tril()[None, None]
    stays(model, ids, set(), attention_mask=seen)
    assert terrazzo.counters()["local_attention"]["cpu"] == 2


def test_another_attention_implementation():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("terrazzo_test", sdpa_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register("terrazzo_test", sdpa_mask)
    stays(blt(attn_implementation="terrazzo_test"), tokens(2, 30), {"local_attention", "patch_cross_attention"})


def test_embeddings_with_hooks_or_adapters():
    model = blt()
    model.enable_input_require_grads()  # a hook, as for adapters on a checkpointed model
    stays(model, tokens(2, 30), {"byte_hash_embedding"})


def test_a_sparse_table_gets_a_sparse_gradient():
    model, ids = blt(), tokens(2, 30)
    _, dense = loss_and_gradients(model, ids)
    model.model.encoder_hash_tok_embedding.sparse = True
    with terrazzo.patch(model):
        _, got = loss_and_gradients(model, ids)
    name = "model.encoder_hash_tok_embedding.weight"
    assert got[name].is_sparse
    assert not far_gradients(got | {name: got[name].to_dense()}, dense)


def test_other_code_that_reads_the_masks_gets_tensors():
    """An attention with a forward of its own on the instance, and a hook that looks at what it is given."""
    model, ids = blt(), tokens(2, 30)
    seen = []

    def look(module, args, kwargs):
        mask = kwargs["attention_mask"]
        seen.append((mask.shape[-2:], mask[0, 0, :1].sum().item(), (torch.ones(2) @ mask.float()[0, 0, :2]).shape))

    with torch.no_grad():
        want = run(model, ids)
        encoder = model.model.local_encoder
        own = [encoder.layers[0].self_attn, encoder.cross_attn_layers[0], model.model.local_decoder.cross_attn_layers[0]]
        for module in own:
            module.forward = type(module).forward.__get__(module)
        encoder.layers[1].self_attn.register_forward_pre_hook(look, with_kwargs=True)
        handle = terrazzo.patch(model, strict=False)
        terrazzo.reset_counters()
        assert not far(run(model, ids), want, LOGITS)
        assert ops_that_ran() == OPS and seen[0][0] == (30, 30) and seen[0][1:] == (1, (30,))
        handle.undo()
        for module in own:
            del module.forward
        assert torch.equal(run(model, ids), want)


# ---- negative controls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["byte_hash_embedding", "local_attention", "patch_cross_attention", "patch_reduce", "hf_patch_lengths", "patch_ids_from_lengths"])
def test_a_wrong_op_is_caught(op, monkeypatch):
    def wrong(*args, **kwargs):
        out = true_op(*args, **kwargs)
        if out.is_floating_point():
            return out * 1.01
        return out.roll(1, 1) if op == "hf_patch_lengths" else (out - 1).clamp(min=0)

    true_op = getattr(adapters_blt, op)
    model, ids = blt(), tokens(2, 40)
    with torch.no_grad():
        want = run(model, ids)
        monkeypatch.setattr(adapters_blt, op, wrong)
        with terrazzo.patch(model):
            assert far(run(model, ids), want, LOGITS)
