"""Checks of loading and saving sharded models, run on every rank."""
import filecmp
import shutil
import tempfile
from contextlib import contextmanager
from math import prod
from pathlib import Path

import pytest
import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import tensors
from ranks.experts import our_dbrx, our_loss
from ranks.rows import our_bamba
from terrazzo import models
from terrazzo.distributed import expert_parallel, full_tensor, reduce_gradients, tensor_parallel
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard


@contextmanager
def shared_folder():
    """The same empty directory on every rank."""
    path = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(path)
    try:
        yield Path(path[0])
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(path[0])


def written(model, folder, **options):
    """The folder, with the whole model in it."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder, **options)
    dist.barrier()
    return folder


def same_files(a, b):
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    assert all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


@contextmanager
def counted(read):
    """Inside, every tensor that is read from safetensors adds its bytes to the list."""
    original = safetensors.safe_open

    class Slices:
        def __init__(self, slices):
            self.slices, self.get_shape = slices, slices.get_shape

        def __getitem__(self, index):
            found = self.slices[index]
            read.append(found.nbytes)
            return found

    class File:
        def __init__(self, *args):
            self.file = original(*args)
            self.keys = self.file.keys

        def get_slice(self, name):
            return Slices(self.file.get_slice(name))

        def get_tensor(self, name):
            found = self.file.get_tensor(name)
            read.append(found.nbytes)
            return found

    safetensors.safe_open = File
    try:
        yield read
    finally:
        safetensors.safe_open = original


def fsdp2(model, mesh, parts):
    for part in (*parts, model):
        fully_shard(part, mesh=mesh)


def experts_and_fsdp2(model, mesh):
    expert_parallel(model, mesh)
    experts = {p for name, p in model.named_parameters() if ".experts." in name}
    for block in (*model.transformer.blocks, model):
        fully_shard(block, mesh=mesh, ignored_params=experts)


def same_from_checkpoint(model, step, expected, folder):
    """`model`, which has other weights, reads those of torch's checkpoint `step` and saves to `folder` what `expected` holds."""
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=step)
    set_model_state_dict(model, state["model"])
    model.save_pretrained(folder)
    same_files(expected, folder)


def loaded(cls, folder, shard, whole, share):
    """The sharded model in the folder, after a look at what was read: share(name, shape) numbers of each parameter of `whole`."""
    with counted([]) as read:
        model = cls.from_pretrained(folder, shard=shard)
    assert sum(read) == 4 * sum(share(name, tuple(t.shape)) for name, t in whole.state_dict().items() if name not in whole.tied())
    for name, value in get_model_state_dict(model).items():
        found = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert torch.equal(found, whole.state_dict()[name]), name
    return model


def part(shape, mesh):
    """Numbers of a tensor that this rank has under FSDP2: rows in pieces of rows / ranks, rounded up."""
    piece = -(-shape[0] // mesh.size())
    return max(0, min(piece, shape[0] - mesh.get_local_rank() * piece)) * prod(shape[1:]) or 1  # one number tells the dtype where there is none


def ranks_read_their_own_parts(mesh):
    whole, ids = our_dbrx().eval(), torch.arange(3, 20)[None]
    with shared_folder() as folder:
        written(whole, folder / "one")
        written(whole, folder / "many", max_shard_bytes=20_000)
        for kind in ("one", "many"):
            model = loaded(models.Dbrx, folder / kind, lambda m: expert_parallel(m, mesh), whole,
                           lambda name, shape: prod(shape) // (mesh.size() if ".experts." in name else 1))
            torch.testing.assert_close(model(ids).logits, whole(ids).logits)
        model = loaded(models.Dbrx, folder / "one", lambda m: experts_and_fsdp2(m, mesh), whole,
                       lambda name, shape: prod(shape) // mesh.size() if ".experts." in name else part(shape, mesh))
        torch.testing.assert_close(model(ids).logits, whole(ids).logits)
        model = models.Dbrx.from_pretrained(folder / "one", torch.bfloat16, shard=lambda m: experts_and_fsdp2(m, mesh))
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())


SPLIT = [(tensors.blenderbot, ("shared", "logits_bias", "q_proj", "k_proj", "v_proj", "fc1", "out_proj.weight", "fc2.weight")),
         (tensors.dbrx, ("wte", "lm_head", "Wqkv", "out_proj", ".experts.")),
         (tensors.bamba, ("embed_tokens", "lm_head", "_proj", "conv1d", "dt_bias", "A_log", ".D", "mamba.norm")),
         (tensors.blt, ("lm_head", "hash_tok_embedding", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))]  # fmt: skip


def ranks_read_their_own_heads(mesh):
    """Tensor parallelism: Wqkv, in_proj, convolutions and experts, of which a rank has pieces here and there, too. And the same files again."""
    for make, split in SPLIT:
        whole = make()

        def share(name, shape, split=split):
            return prod(shape) // (mesh.size() if any(part in name for part in split) and "patcher" not in name else 1)

        with shared_folder() as folder:
            written(whole, folder / "model")
            model = loaded(type(whole), folder / "model", lambda m: tensor_parallel(m, mesh), whole, share)
            model.save_pretrained(folder / "again")
            same_files(folder / "model", folder / "again")
            state = get_model_state_dict(model)
            dcp.save({"model": state}, checkpoint_id=folder / "step")
            other = tensor_parallel(type(whole)(whole.config), mesh)  # other weights
            same_from_checkpoint(other, folder / "step", folder / "model", folder / "other")


def loaded_on_two_dimensions(mesh):
    """Tensor parallelism beside experts, and beside FSDP2."""
    grid = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "tensor"))

    def with_experts(model):
        return tensor_parallel(expert_parallel(model, grid["other"]), grid["tensor"])

    def with_fsdp2(model):
        fsdp2(tensor_parallel(model, grid["tensor"]), grid["other"], model.model.layers)

    for make, shard in ((tensors.dbrx, with_experts), (tensors.bamba, with_fsdp2), (lambda: tensors.bamba(mamba_n_groups=1, tie_word_embeddings=True), with_fsdp2)):
        whole = make()
        with shared_folder() as folder:
            written(whole, folder / "model")
            with counted([]) as read:
                model = type(whole).from_pretrained(folder / "model", shard=shard)
            assert sum(read) == sum(p.to_local().nbytes for p in {id(p): p for p in model.parameters()}.values())
            for name, _ in model.named_parameters():
                assert torch.equal(full_tensor(model, name), whole.state_dict()[name]), name
            model.save_pretrained(folder / "again")
            same_files(folder / "model", folder / "again")


def tied_weights_stay_tied(mesh):
    whole, ids = our_bamba(tie_word_embeddings=True).eval(), torch.arange(3, 20)[None]
    with shared_folder() as folder:
        written(whole, folder / "model")
        model = loaded(models.Bamba, folder / "model", lambda m: fsdp2(m, mesh, m.model.layers), whole, lambda name, shape: part(shape, mesh))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        logits, loss = model(ids, labels=ids)
        torch.testing.assert_close(logits, whole(ids).logits)
        loss.backward()
        model.save_pretrained(folder / "again")
        same_files(folder / "model", folder / "again")


def back_to_safetensors(mesh):
    """A model that was loaded sharded writes the very files that it was loaded from."""
    with shared_folder() as folder:
        for kind, options in (("one", {}), ("many", dict(max_shard_bytes=20_000))):
            written(our_dbrx(), folder / kind, **options)
            for shard in (expert_parallel, experts_and_fsdp2):
                model = models.Dbrx.from_pretrained(folder / kind, shard=lambda m, shard=shard: shard(m, mesh))
                model.save_pretrained(folder / "again", **options)
                same_files(folder / kind, folder / "again")
        assert len(list((folder / "again").glob("*.safetensors"))) > 3
        model.save_pretrained(folder / "again", torch.bfloat16)
        if dist.get_rank() == 0:
            our_dbrx().save_pretrained(folder / "half", torch.bfloat16)
            same_files(folder / "half", folder / "again")


def through_torchs_checkpoints(mesh):
    """Model and optimiser through torch.distributed.checkpoint, and into another sharding: training goes on as it would have."""
    ids = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(9))

    def step(model, optimiser):
        our_loss(model, ids)[0].backward()
        reduce_gradients(model, mesh)
        optimiser.step()
        optimiser.zero_grad()

    model = expert_parallel(our_dbrx(), mesh)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    with shared_folder() as folder:
        step(model, optimiser)
        dcp.save({"model": get_model_state_dict(model), "optimiser": get_optimizer_state_dict(model, optimiser)}, checkpoint_id=folder / "step1")
        model.save_pretrained(folder / "model1")
        step(model, optimiser)
        model.save_pretrained(folder / "model2")

        again = expert_parallel(models.Dbrx(model.config), mesh)  # other weights
        optimiser = torch.optim.AdamW(again.parameters(), lr=0.01)
        state = {"model": get_model_state_dict(again), "optimiser": get_optimizer_state_dict(again, optimiser)}
        dcp.load(state, checkpoint_id=folder / "step1")
        set_model_state_dict(again, state["model"])
        set_optimizer_state_dict(again, optimiser, state["optimiser"])
        step(again, optimiser)
        again.save_pretrained(folder / "again2")
        same_files(folder / "model2", folder / "again2")

        other = models.Dbrx(model.config)
        fsdp2(other, mesh, other.transformer.blocks)  # experts too are now cut by rows
        same_from_checkpoint(other, folder / "step1", folder / "model1", folder / "other1")


def bad_shards(mesh):
    with shared_folder() as folder:
        written(our_dbrx(), folder / "model")
        with pytest.raises(TypeError, match="terrazzo.Dbrx.from_pretrained: shard must be a function of the model or None, got DeviceMesh"):
            models.Dbrx.from_pretrained(folder / "model", shard=mesh)


CHECKS = ["ranks_read_their_own_parts", "ranks_read_their_own_heads", "tied_weights_stay_tied", "back_to_safetensors", "through_torchs_checkpoints", "bad_shards"]  # fmt: skip
