"""Checks of tensor parallelism, run on every rank: each builds the whole model, computes alone what all ranks compute together, and compares."""
import copy
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import terrazzo
import torch
import torch.distributed as dist
from ranks.spawn import close
from terrazzo import distributed, models
from terrazzo.distributed import collectives, expert_parallel, full_tensor, reduce_gradients, reset_traffic, tensor_parallel, traffic
from terrazzo.models.blt_config import StackConfig
from terrazzo.models.dbrx import AttentionConfig, DbrxConfig, FFNConfig
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

HEADS = dict(num_attention_heads=8, num_key_value_heads=4)


def livened(model, scale=3):
    """Everything that starts as a constant counts, and logits are not all alike."""
    for parameter in model.parameters():
        parameter.data = parameter.data * scale if parameter.dim() > 1 else parameter.data + 0.1 * torch.randn_like(parameter)
    return model.eval()


def blenderbot(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                 decoder_ffn_dim=40, max_position_embeddings=64, scale_embedding=True)  # fmt: skip
    model = livened(models.Blenderbot(models.BlenderbotConfig(**sizes | changes)))
    model.final_logits_bias.normal_()
    return model


def dbrx(**changes):
    torch.manual_seed(0)
    sizes = dict(d_model=64, n_heads=8, n_layers=2, vocab_size=96, attn_config=AttentionConfig(kv_n_heads=4, clip_qkv=8.0),
                 ffn_config=FFNConfig(ffn_hidden_size=24, moe_num_experts=8, moe_top_k=3, moe_loss_weight=0.05))  # fmt: skip
    return livened(models.Dbrx(DbrxConfig(**sizes | changes)))


def bamba(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=3, attn_layer_indices=[1], mamba_n_heads=8, mamba_n_groups=4,
                 mamba_d_state=8, mamba_chunk_size=8, z_loss_coefficient=0.01) | HEADS  # fmt: skip
    return livened(models.Bamba(models.BambaConfig(**sizes | changes)))


def blt(**changes):
    torch.manual_seed(0)
    part = StackConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4)
    patcher = models.EntropyConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, sliding_window=7)
    sizes = dict(local_attention_window_len=9, patching_threshold=5.3, encoder_hash_byte_group_size=[3, 4], encoder_hash_byte_group_vocab=50, encoder=part,
                 decoder=replace(part, cross_attn_all_layers=True), global_=replace(part, hidden_size=64, num_attention_heads=8), patcher=patcher)  # fmt: skip
    return livened(models.Blt(models.BltConfig(**sizes | changes)), 1.5)


def tokens(seed=0, batch=2, length=13, vocab=96):
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def causal(model, seed=0):
    labels = tokens(seed)
    labels[0, 4:6] = -100
    return model(tokens(seed), labels=labels)[:2]


def padded(model, seed=0):
    valid = torch.ones_like(tokens(seed))
    valid[1, :3] = 0
    return model(tokens(seed), labels=tokens(seed).masked_fill(valid == 0, -100), attention_mask=valid)[:2]


def with_router_logits(model, seed=0):
    return model(tokens(seed), labels=tokens(seed), output_router_logits=True)[:2]


def packed(model, seed=0):
    ids = tokens(seed, batch=1)
    return model(ids, labels=ids, cu_seqlens=torch.tensor([0, 5, 13], dtype=torch.int32))[:2]


def answered(model, seed=1):
    valid = torch.ones_like(tokens(seed))
    valid[0, 9:] = 0
    labels = tokens(seed + 1, length=7)
    labels[1, 5:] = -100
    return model(tokens(seed), labels=labels, attention_mask=valid)[:2]


def cut(model, seed=0):
    return model(tokens(seed), labels=tokens(seed), patch_lengths=torch.tensor([[1, 2, 4, 6, 0], [1, 5, 3, 2, 2]]))[:2]


def bytewise(model, seed=0):
    return model(tokens(seed), labels=tokens(seed))[:2]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model):
    return {name: p.grad if not isinstance(p, DTensor) else full_tensor(model, name, p.grad) for name, p in model.named_parameters() if p.requires_grad}


def results(model, call):
    """Loss, logits and gradients, whole."""
    logits, loss = call(model)
    assert type(loss) is torch.Tensor
    loss.backward()
    return {"loss": loss, "logits": whole(logits)} | gradients(model)


def reference(make, call, dtype):
    return results(make().to(dtype), call)


def results_of(prepare, call, batches, dtype):
    """Results of several batches, stacked by name: of one batch, gradients of few numbers would be judged by chance."""
    found = [results(prepare(), partial(call, seed=seed)) for seed in range(batches)]
    return {name: torch.stack([each[name].detach() for each in found]).to(dtype) for name in found[0]}


def exact(mesh, make, call, dtype=torch.float32, batches=8, split=tensor_parallel):
    """Loss, logits and every gradient, against one rank, by the tolerance rule; in bfloat16 by that of whole models."""
    def prepare():
        model = split(make().to(dtype), mesh)
        assert split is not tensor_parallel or all(isinstance(p, DTensor) for p in model.parameters())
        return model

    whole_model = dtype == torch.bfloat16
    found = results_of(prepare, call, batches, dtype)
    expected = results_of(lambda: make().to(dtype).double(), call, batches, torch.float64)
    rounded = [results_of(lambda: make().to(dtype), call, batches, dtype)]
    if whole_model:
        with terrazzo.use_backend("reference"):
            rounded.append(results_of(lambda: make().to(dtype), call, batches, dtype))
    assert list(found) == list(expected)
    for name, value in found.items():
        if expected[name].abs().max() < 1e-12:  # a bias of keys, which softmax doesn't see: the gradient is zero but for rounding
            assert value.abs().max() < (0.1 if whole_model else 1e-4), name
        else:
            close(name, value, expected[name], *(each[name] for each in rounded), whole_model=whole_model)


def blenderbot_split(mesh):
    exact(mesh, blenderbot, answered)
    exact(mesh, lambda: blenderbot(tie_word_embeddings=False, scale_embedding=False), answered)


def dbrx_split(mesh):
    for call in (causal, padded, packed, with_router_logits):
        exact(mesh, dbrx, call)


def bamba_split(mesh):
    for call in (causal, padded, packed):
        exact(mesh, bamba, call)
    exact(mesh, lambda: bamba(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, mamba_proj_bias=True, mamba_conv_bias=False), causal)


def bamba_with_few_groups(mesh):
    """Fewer groups than ranks: B and C are collected, and the norm's groups span ranks."""
    for groups in (1, 2):
        for call in (causal, padded, packed):
            exact(mesh, lambda: bamba(mamba_n_groups=groups), call)


def blt_split(mesh):
    exact(mesh, blt, cut)
    exact(mesh, lambda: blt(patching_mode="bytes", tie_word_embeddings=True), bytewise)


def split_with_odd_vocabularies(mesh):
    """Words that the ranks don't divide: the last have fewer. Losses, generation and state dicts."""
    for make, call in ((lambda: blenderbot(vocab_size=97), answered), (lambda: dbrx(vocab_size=98), causal), (lambda: bamba(vocab_size=101, tie_word_embeddings=True), padded)):
        exact(mesh, make, call)
        expected, model = make(), tensor_parallel(make(), mesh)
        assert torch.equal(model.generate(tokens(3), 5, eos_token_id=None), expected.generate(tokens(3), 5, eos_token_id=None))
        for name, value in model.state_dict().items():
            assert torch.equal(whole(value), expected.state_dict()[name]), name


def split_in_float64(mesh):
    exact(mesh, blenderbot, answered, torch.float64, batches=1)


def split_in_bfloat16(mesh):
    in_bfloat16 = partial(exact, mesh, dtype=torch.bfloat16)
    in_bfloat16(blenderbot, answered)
    every = FFNConfig(ffn_hidden_size=24, moe_num_experts=8, moe_top_k=8)  # else rounding would choose others where two are nearly as good
    in_bfloat16(lambda: dbrx(ffn_config=every), causal)
    in_bfloat16(bamba, causal)
    in_bfloat16(lambda: bamba(mamba_n_groups=1), packed)
    in_bfloat16(blt, cut)


def split_and_computed_again(mesh):
    """Gradient checkpointing: sums are made again in the backward pass, on all ranks in one order."""
    for make, call in ((dbrx, causal), (bamba, causal), (blenderbot, answered), (blt, cut)):
        def again(make=make):
            model = make(**dict(dropout=0.0) if make is blenderbot else {})
            model.gradient_checkpointing = True
            return model.train()

        exact(mesh, again, call)


def a_missing_sum_shows(mesh):
    """The comparison above fails where a sum over ranks is left out."""
    original = collectives.Ranks.sum
    collectives.Ranks.sum = lambda self, tensor, purpose, *op: tensor.clone() if purpose == "tensor norms" else original(self, tensor, purpose, *op)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(AssertionError, match="max error"):
                exact(mesh, lambda: bamba(mamba_n_groups=1), causal, dtype, batches=2)
    finally:
        collectives.Ranks.sum = original


def generated_alike(mesh):
    """The tokens of one rank, on every rank: from caches, with padding, beams and sampling."""
    padding = torch.ones(2, 13, dtype=torch.long)
    padding[1, :4] = 0
    behind = torch.ones(2, 13, dtype=torch.long)
    behind[0, 9:] = 0
    for make, settings in (
        (dbrx, dict(max_new_tokens=8, attention_mask=padding)), (bamba, dict(max_new_tokens=8, attention_mask=padding)),
        (lambda: bamba(mamba_n_groups=1), dict(max_new_tokens=8, num_beams=3)), (lambda: bamba(mamba_n_groups=2), dict(max_new_tokens=8)),
        (bamba, dict(max_new_tokens=8, temperature=0.8, top_k=20)), (blenderbot, dict(max_new_tokens=8, attention_mask=behind)),
        (blenderbot, dict(max_new_tokens=8, num_beams=4)), (blt, dict(max_new_tokens=12)), (blt, dict(max_new_tokens=6, attention_mask=padding)),
    ):  # fmt: skip
        expected, found = (each.generate(tokens(3), generator=torch.Generator().manual_seed(1), eos_token_id=None, **settings) for each in (make(), tensor_parallel(make(), mesh)))
        assert torch.equal(found, expected), (make, settings, found, expected)


def whole_again(mesh):
    """State dicts are in the model's order, byte for byte, and load into a model of other values."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    for make in (blenderbot, dbrx, bamba, lambda: bamba(mamba_n_groups=1, mamba_proj_bias=True), blt, lambda: dbrx(ffn_config=FFNConfig(24, 3, 2))):
        before = {name: value.clone() for name, value in make().state_dict().items()}
        model = tensor_parallel(make(), mesh)
        after = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert list(after) == list(before) and all(type(after[name]) is torch.Tensor and torch.equal(after[name], before[name]) for name in before)
        for name, parameter in model.named_parameters():
            assert torch.equal(full_tensor(model, name), before[name])
            parameter.data.mul_(0)
        set_model_state_dict(model, dict(before), options=StateDictOptions(full_state_dict=True))
        after = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert all(torch.equal(after[name], before[name]) for name in before)


def loaded_without_a_whole_model(mesh):
    """A model on the meta device is spread first; its state dict tells what to load, and nothing is whole on a rank but what the state dict has whole."""
    for make, call in ((blenderbot, answered), (dbrx, causal), (lambda: bamba(tie_word_embeddings=True), causal), (blt, cut)):
        source = make()
        stored = source.state_dict()
        with torch.device("meta"):
            model = type(source)(source.config).eval()
        tensor_parallel(model, mesh)
        state = {name: stored[name] if not isinstance(like, DTensor) else distribute_tensor(stored[name], mesh, like.placements, src_data_rank=None)
                 for name, like in model.state_dict().items()}  # fmt: skip
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        with torch.no_grad():
            torch.testing.assert_close(whole(call(model)[0]), call(source)[0], rtol=1e-4, atol=1e-5)
        assert all(model.get_parameter(name) is model.get_parameter(other) for name, other in model.tied().items())


def placements(mesh):
    model = tensor_parallel(dbrx(), mesh)
    found = dict(model.named_parameters())
    block = "transformer.blocks.0."
    expected = {"transformer.wte.weight": Shard(0), "lm_head.weight": Shard(0), "transformer.norm_f.weight": Replicate(), f"{block}ffn.experts.mlp.w1": Shard(0),
                f"{block}norm_attn_norm.attn.Wqkv.weight": Shard(0), f"{block}norm_attn_norm.attn.out_proj.weight": Shard(1), f"{block}ffn.router.layer.weight": Replicate()}
    assert {name: found[name].placements for name in expected} == {name: (placement,) for name, placement in expected.items()}
    w1 = model.transformer.blocks[0].ffn.experts.mlp.w1  # as modules see it: every expert's part
    assert torch.equal(w1, torch.cat([w.chunk(mesh.size())[mesh.get_local_rank()] for w in dbrx().transformer.blocks[0].ffn.experts.mlp.w1.chunk(8)]))
    assert model.transformer.blocks[0].ffn.experts.state_dict()["mlp.w1"].placements == (Shard(0),)  # experts are dealt out whole for a checkpoint
    tied = tensor_parallel(blenderbot(), mesh)
    assert tied.lm_head._parameters["weight"] is tied.model.shared._parameters["weight"]


def an_optimiser_steps_split(mesh):
    """AdamW with clipped gradients moves every weight as it does on one rank."""
    for make, call in ((lambda: bamba(mamba_n_groups=1), causal), (blt, cut)):
        model, alone = tensor_parallel(make(), mesh), make()
        for each in (model, alone):
            call(each)[1].backward()
            norm = torch.nn.utils.clip_grad_norm_([p for p in each.parameters() if p.requires_grad], 0.5)
            torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.01, eps=1e-3).step()
            norms = [whole(norm)] if each is model else [*norms, norm]
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
        for name, expected in alone.named_parameters():
            torch.testing.assert_close(full_tensor(model, name), expected.detach(), rtol=2e-4, atol=2e-6, msg=name)


def copies_of_split_models(mesh):
    model = tensor_parallel(bamba(mamba_n_groups=1), mesh)
    twin = copy.deepcopy(model)
    assert torch.equal(whole(twin(tokens()).logits), whole(model(tokens()).logits))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert whole(model(tokens()).logits).abs().max() > 0 == whole(twin(tokens()).logits).abs().max()


# ---- two dimensions ----------------------------------------------------------------------------------------------


def two_dimensions(*names):
    return dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def mean_of(call, batches):
    """call over all batches: the mean of their losses, and the logits of the first."""
    def run(model):
        results = [call(model, ids) for ids in batches]
        return results[0][0], sum(loss for _, loss in results) / len(results)

    return run


def one_batch(model, ids):
    return model(ids, labels=ids)[:2]


def tensor_and_fsdp(mesh):
    """fully_shard on one dimension, tensor_parallel on the other: every rank of a row has its own batch."""
    from torch.distributed.fsdp import fully_shard

    grid = two_dimensions("data", "tensor")
    batches = [tokens(seed, length=9 + 4 * seed) for seed in range(2)]
    for make, blocks in ((dbrx, lambda m: m.transformer.blocks), (bamba, lambda m: m.model.layers), (lambda: bamba(mamba_n_groups=1), lambda m: m.model.layers)):
        model = tensor_parallel(make(), grid["tensor"])
        for block in (*blocks(model), model):
            fully_shard(block, mesh=grid["data"])
        mine = batches[grid["data"].get_local_rank()]
        loss = one_batch(model, mine)[1]
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=grid["data"].get_group())
        found = {"loss": mean / 2} | gradients(model)
        run = mean_of(one_batch, batches)
        expected = [reference(make, run, dtype) for dtype in (torch.float64, torch.float32)]
        for name, value in found.items():
            close(name, value, *(each[name] for each in expected))
        state = make().state_dict()
        for name, _ in model.named_parameters():
            assert torch.equal(full_tensor(model, name), state[name]), name
    with pytest.raises(ValueError, match="must be sharded over this mesh, another dimension of it, or not at all"):
        reduce_gradients(fully_shard(dbrx(), mesh=mesh), grid["data"])


def tensor_and_experts(mesh):
    """Experts on one dimension, each of them split on the other, as all else is."""
    grid = two_dimensions("experts", "tensor")
    batches = [tokens(seed, length=9 + 4 * seed) for seed in range(2)]
    model = expert_parallel(dbrx(), grid["experts"], chunks=2)
    tensor_parallel(model, grid["tensor"])
    w1 = dict(model.named_parameters())["transformer.blocks.0.ffn.experts.mlp.w1"]
    assert w1.placements == (Shard(0), Shard(0)) and w1.to_local().numel() * 4 == w1.numel()
    loss = one_batch(model, batches[grid["experts"].get_local_rank()])[1]
    loss.backward()
    reduce_gradients(model, grid["experts"])
    mean = loss.detach().clone()
    dist.all_reduce(mean, group=grid["experts"].get_group())
    found = {"loss": mean / 2} | gradients(model)
    expected = [reference(dbrx, mean_of(one_batch, batches), dtype) for dtype in (torch.float64, torch.float32)]
    for name, value in found.items():
        close(name, value, *(each[name] for each in expected))
    state = dbrx().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(full_tensor(model, name), state[name]) and torch.equal(whole(value), state[name]), name


# ---- bytes -------------------------------------------------------------------------------------------------------


def split_bytes_are_the_formula(mesh):
    """docs/distributed.md: what each rank sends in a forward and a backward pass of (B, L) tokens, in float32."""
    R, (B, L), D = mesh.size(), (2, 12), 64
    ids = tokens(batch=B, length=L)
    rows, ring, some = B * L * D * 4, 2 * (R - 1), R - 1
    layers = 2 * 2 * 2 * rows * ring // R  # two layers of two sums, forward and backward
    head, losses = rows * ring // R, 3 * 4 * B * L * ring // R
    for make, more in (
        (dbrx, {"tensor layers": layers + 2 * 4 * B * L * 3 * ring // R}),  # and the gradients of the routing weights
        (lambda: bamba(num_hidden_layers=2, z_loss_coefficient=0.0), {"tensor layers": layers}),
        (lambda: bamba(num_hidden_layers=2, z_loss_coefficient=0.0, mamba_n_groups=1),
         {"tensor layers": layers, "tensor groups": 2 * 2 * (4 * B * L * 8 // R) * some, "tensor norms": 2 * 4 * B * L * ring // R}),
    ):  # fmt: skip
        model = tensor_parallel(make(), mesh)
        reset_traffic()
        model(ids, labels=ids).loss.backward()
        assert traffic() == {"tensor embeddings": rows * ring // R, "tensor heads": head, "tensor losses": losses} | more, (traffic(), more)
    model = tensor_parallel(dbrx(), mesh)
    reset_traffic()
    with torch.no_grad():
        model.generate(ids, 1, eos_token_id=None)
    assert traffic() == {"tensor embeddings": rows * ring // R, "tensor layers": 2 * 2 * rows * ring // R, "tensor heads": 4 * B * 96 // R * some}
    model = tensor_parallel(blt(), mesh)
    D, k, S, bytes_, patches = 32, 2, 5, B * 13, B * 5
    reset_traffic()
    cut(model)[1].backward()
    one = ring * 4  # times numbers / R: a sum
    local = 2 * 2 * 2 * 2 * bytes_ * D * one // R  # two layers each of encoder and decoder
    middle = 2 * 2 * 2 * patches * 64 * one // R
    crosses = (2 * patches * k * D + bytes_ * D) + 2 * (2 * bytes_ * D + patches * k * D)  # encoder's last; two of the decoder: sums of outputs, q_norm, k_norm
    assert traffic()["tensor layers"] == local + middle + crosses * one // R
    assert traffic()["tensor embeddings"] == 4 * bytes_ * D // R * some + 260 * D * one // R
    assert (traffic()["tensor heads"], traffic()["tensor losses"]) == (bytes_ * D * one // R, 3 * bytes_ * one // R)


# ---- bad input ---------------------------------------------------------------------------------------------------


@contextmanager
def unchanged(model):
    """The block raises before anything of the model is changed."""
    before = dict(model.named_parameters())
    yield
    assert all(p is before[name] for name, p in model.named_parameters())


def split_bad_input(mesh):
    R = mesh.size()
    for make, told in (
        (lambda: dbrx(attn_config=AttentionConfig(kv_n_heads=1)), f"the {R} ranks of mesh must divide the 1 heads of keys and values of transformer.blocks.0.norm_attn_norm.attn"),
        (lambda: dbrx(d_model=60, n_heads=5, attn_config=AttentionConfig(kv_n_heads=5)), f"the {R} ranks of mesh must divide the 5 heads of queries of"),
        (lambda: dbrx(vocab_size=R - 1), f"each of the {R} ranks of mesh must have some of the {R - 1} words of the vocabulary of transformer.wte"),
        (lambda: dbrx(ffn_config=FFNConfig(25, 2, 1)), f"the {R} ranks of mesh must divide the 25 channels of an expert of transformer.blocks.0.ffn.experts"),
        (lambda: bamba(intermediate_size=49), f"the {R} ranks of mesh must divide the 49 channels of model.layers.0.feed_forward.gate_proj"),
        (lambda: bamba(mamba_n_heads=1, mamba_n_groups=1), f"the {R} ranks of mesh must divide the 1 heads of the scan of model.layers.0.mamba"),
        (lambda: bamba(hidden_size=96, mamba_n_heads=12, mamba_n_groups=3), f"the {R} ranks of mesh must divide the 3 groups of model.layers.0.mamba, or be a multiple"),
        (lambda: blenderbot(decoder_ffn_dim=49), f"the {R} ranks of mesh must divide the 49 channels of model.decoder.layers.0.fc1"),
    ):
        model = make()
        with unchanged(model), pytest.raises(ValueError, match="terrazzo.distributed.tensor_parallel: " + told):
            tensor_parallel(model, mesh)
    with pytest.raises(TypeError, match="model must be a Bamba, Dbrx, Blt or Blenderbot of terrazzo.models, got torch.nn.modules.linear.Linear"):
        tensor_parallel(torch.nn.Linear(4, 4), mesh)
    with pytest.raises(TypeError, match="model must be a Bamba, Dbrx, Blt or Blenderbot of terrazzo.models, got builtins.int"):
        tensor_parallel(3, mesh)
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh of one dimension, got NoneType"):
        tensor_parallel(dbrx(), None)
    with pytest.raises(ValueError, match="name must be that of a parameter of model, got 'lm_head.bias'"):
        full_tensor(tensor_parallel(dbrx(), mesh), "lm_head.bias")


def plans_that_do_not_combine(mesh):
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(ValueError, match="transformer.wte.weight is spread over ranks already; call tensor_parallel before fully_shard and after expert_parallel"):
        tensor_parallel(tensor_parallel(dbrx(), mesh), mesh)
    with pytest.raises(ValueError, match="is spread over ranks already; call tensor_parallel before fully_shard"):
        tensor_parallel(fully_shard(dbrx(), mesh=mesh), mesh)
    with pytest.raises(ValueError, match="mesh must be another dimension of the mesh that transformer.blocks.0.ffn.experts.mlp.w1 is spread over"):
        tensor_parallel(expert_parallel(dbrx(), mesh), mesh)
    with pytest.raises(ValueError, match="the weights of transformer.blocks.0.ffn.experts must be plain tensors, got a .* w1; shard experts before anything else"):
        expert_parallel(tensor_parallel(dbrx(), mesh), mesh)
    with pytest.raises(ValueError, match="reduce_gradients: mesh must be another than that of tensor_parallel"):
        reduce_gradients(tensor_parallel(dbrx(), mesh), mesh)


def split_models_that_differ(mesh):
    """Sizes, settings or values: every rank raises, and no weight is touched."""
    first = mesh.get_local_rank() == 0
    for make in (lambda: dbrx(n_layers=2 if first else 3), lambda: dbrx(rope_theta=1e4 if first else 1e5), lambda: bamba(mamba_n_heads=8 if first else 16)):
        model = make()
        with unchanged(model), pytest.raises(ValueError, match="tensor_parallel: every rank must pass the same model and arguments, got .* on rank 0 and .* on rank 1"):
            tensor_parallel(model, mesh)
    model = dbrx()
    model.lm_head.weight.data += 0 if first else 1
    with unchanged(model), pytest.raises(ValueError, match="every rank must pass the same model and arguments, got lm_head.weight .* on rank 0 and lm_head.weight .* on rank 1"):
        tensor_parallel(model, mesh)


def plans_for_parallelize_module(mesh):
    """A plan is torch's own: its styles go one by one, and some of them alone are right too."""
    from torch.distributed.tensor.parallel import parallelize_module

    plan = distributed.plan(bamba())
    some = {path: style for path, style in plan.items() if path.startswith("model.layers.1")}
    split = partial(parallelize_module, parallelize_plan=some)
    model = split(bamba(), mesh)
    assert isinstance(model.model.layers[1].self_attn.q_proj._parameters["weight"], DTensor) and type(causal(model)[0]) is torch.Tensor
    exact(mesh, bamba, causal, split=split)


SPLIT = ["blenderbot_split", "dbrx_split", "bamba_split", "bamba_with_few_groups", "blt_split", "split_with_odd_vocabularies", "split_in_float64", "split_in_bfloat16", "split_and_computed_again", "a_missing_sum_shows",
         "generated_alike", "whole_again", "loaded_without_a_whole_model", "placements", "an_optimiser_steps_split", "copies_of_split_models", "split_bytes_are_the_formula", "split_bad_input",
         "plans_that_do_not_combine", "split_models_that_differ", "plans_for_parallelize_module"]  # fmt: skip
