"""Checkpoints: read, written back byte for byte, and refused with the reason."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from terrazzo.models import Bamba

from model_pairs import KINDS, ids, pair


def tensors_in(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", [5_000_000_000, 20_000])
def test_round_trip(kind, shard, tmp_path):
    ours, theirs = pair(kind, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", max_shard_bytes=shard)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (shard < 1e6)
    assert equal(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs"))
    again, back = type(ours).from_pretrained(tmp_path / "ours"), KINDS[kind][2].from_pretrained(tmp_path / "ours").eval()
    assert equal(again.state_dict(), ours.state_dict())
    assert again.config == ours.config
    for name, weight in back.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name


def test_shards_of_transformers(tmp_path):
    ours, theirs = pair("bamba", tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert equal(Bamba.from_pretrained(tmp_path / "many").state_dict(), ours.state_dict())


def test_dtype(tmp_path):
    ours, _ = pair("bamba", tmp_path)
    half = Bamba.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.lm_head.weight, ours.lm_head.weight.bfloat16())
    with pytest.raises(TypeError, match="dtype must be"):
        Bamba.from_pretrained(tmp_path, dtype=torch.int8)


def test_saved_over_itself(tmp_path):
    """The weights are mapped from the very file that is written."""
    ours, _ = pair("bamba", tmp_path)
    before = ours(ids()).logits
    ours.save_pretrained(tmp_path, max_shard_bytes=20_000)
    ours.save_pretrained(tmp_path)
    assert torch.equal(Bamba.from_pretrained(tmp_path)(ids()).logits, before)
    assert torch.equal(ours(ids()).logits, before)
    assert sorted(path.name for path in tmp_path.glob("*model*")) == ["model.safetensors"]


def test_training_leaves_the_file_alone(tmp_path):
    ours, _ = pair("bamba", tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    ours.train()
    optimiser = torch.optim.SGD(ours.parameters(), 0.1)
    ours(ids(), labels=ids()).loss.backward()
    optimiser.step()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_tied_head_is_one_tensor(tmp_path):
    ours, _ = pair("bamba", tmp_path, tie_word_embeddings=True)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert "lm_head.weight" not in tensors_in(tmp_path)


def damage(tmp_path, change):
    pair("bamba", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})


def test_every_wrong_tensor_is_named(tmp_path):
    def change(tensors):
        tensors.pop("model.layers.0.mamba.D")
        tensors["model.layers.9.mamba.D"] = torch.zeros(3)
        tensors["lm_head.weight"] = torch.zeros(97, 16)

    damage(tmp_path, change)
    with pytest.raises(ValueError) as error:
        Bamba.from_pretrained(tmp_path)
    for part in ("missing: model.layers.0.mamba.D", "surplus: model.layers.9.mamba.D", "wrong shape: lm_head.weight (97, 16), not (97, 32)"):
        assert part in str(error.value)


def test_truncated(tmp_path):
    pair("bamba", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Bamba.from_pretrained(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        Bamba.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        Bamba.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is not read, it can run code"):
        Bamba.from_pretrained(tmp_path)
    pair("bamba", tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        Bamba.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Bamba.from_pretrained(tmp_path)


def test_another_model(tmp_path):
    pair("dbrx", tmp_path)
    with pytest.raises(ValueError, match="must have model_type 'bamba', got 'dbrx'"):
        Bamba.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, error, message", [
    (lambda index: index["weight_map"].update({"x": "../../secret.safetensors"}), ValueError, "shards lie beside their index"),
    (lambda index: index["weight_map"].update({"x": "model-00099.safetensors"}), FileNotFoundError, "does not exist, yet"),
    (lambda index: index["weight_map"].update({"x": sorted(index["weight_map"].values())[0]}), ValueError, "lacks what .* says is in it: x"),
    (lambda index: index.pop("weight_map"), ValueError, "no index of shards"),
])  # fmt: skip
def test_bad_index(change, error, message, tmp_path):
    ours, _ = pair("bamba", tmp_path / "one")
    ours.save_pretrained(tmp_path / "many", max_shard_bytes=20_000)
    path = tmp_path / "many/model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        Bamba.from_pretrained(tmp_path / "many")


def test_peak_memory(tmp_path):
    """A checkpoint takes its own size, in a fresh process, all of it read: no second copy on the way."""
    import subprocess
    import sys

    config = dict(vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
                  attn_layer_indices=[1], mamba_n_heads=32, mamba_d_head=64, mamba_d_state=64)  # fmt: skip
    from terrazzo.models import BambaConfig

    Bamba(BambaConfig(**config)).save_pretrained(tmp_path)
    script = (
        "import sys, resource, torch; from terrazzo.models import Bamba\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "Bamba; before = peak(); model = Bamba.from_pretrained(sys.argv[1]); sum(float(w.sum()) for w in model.parameters()); print(peak() - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True).stdout)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 150e6 and grown <= 1.15 * size, (grown, size)
