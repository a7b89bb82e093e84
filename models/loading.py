"""Checkpoints as transformers keeps them: config.json beside safetensors, one file or shards with an index.

A checkpoint is data: only safetensors are read, nothing in them is executed. Files are mapped, not read: tensors whose dtype
and device stay as stored take no memory of their own until they are used.
"""
import json
import os
from pathlib import Path

import torch
from torch import nn

WEIGHTS, INDEX, CONFIG, GENERATION = "model.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"
NAMED = 12  # tensors that an error lists before it only counts them


def read_json(fn, path):
    """The dict in a JSON file."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{fn}: {path.parent} has no {path.name}; give a directory that transformers' save_pretrained wrote") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{fn}: {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{fn}: {path} must hold a JSON object, got {type(found).__name__}")
    return found


def check_model_type(fn, config, wanted):
    if config.get("model_type") not in wanted:
        raise ValueError(f"{fn}: config.json must have model_type {' or '.join(map(repr, wanted))}, got {config.get('model_type')!r}")


def rope_theta(fn, config, default):
    """The base of the rotary embedding in any spelling of a config.json; scaled embeddings are refused, not misread."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{fn}: rope_type must be 'default', got {kind!r}")
    return float(rope.get("rope_theta") or config.get("rope_theta") or default)


class Checkpoint:
    """The tensors of a directory by name, of one file or of the shards of an index; `names` maps each to its file."""

    def __init__(self, fn, folder, weights=WEIGHTS):
        self.fn, self.folder, self._open = fn, Path(folder), {}
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{fn}: {folder} is not a directory; give one with {CONFIG} and {WEIGHTS}")
        if (self.folder / weights).exists():
            self.names = dict.fromkeys(self.file(weights).keys(), weights)
        elif (self.folder / INDEX).exists():
            self.names = self._indexed()
        else:
            others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in self.folder.glob(pattern))
            raise FileNotFoundError(f"{fn}: {folder} has no {weights} and no {INDEX}" +
                                    (f"; {others[0]} is not read, it can run code: save it as safetensors" if others else ""))  # fmt: skip

    def _indexed(self):
        index = read_json(self.fn, self.folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise ValueError(f"{self.fn}: {self.folder / INDEX} is no index of shards: it must hold a weight_map of tensors to files")
        outside = next((file for file in index.values() if Path(file).name != file), None)
        if outside is not None:
            raise ValueError(f"{self.fn}: {self.folder / INDEX} names {outside!r}; shards lie beside their index")
        for file in sorted(set(index.values())):
            lost = sorted(name for name, where in index.items() if where == file and name not in self.file(file).keys())
            if lost:
                raise ValueError(f"{self.fn}: {self.folder / file} lacks what {INDEX} says is in it: {listed(lost)}")
        return index

    def file(self, name):
        from safetensors import SafetensorError, safe_open

        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, "pt")
            except FileNotFoundError:
                raise FileNotFoundError(f"{self.fn}: {self.folder / name} does not exist, yet {INDEX} names it") from None
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.fn}: {self.folder / name} is not a whole safetensors file: {error}") from None
        return self._open[name]

    def shape(self, name):
        return tuple(self.file(self.names[name]).get_slice(name).get_shape())

    def __getitem__(self, name):
        return self.file(self.names[name]).get_tensor(name)

    def slices(self, name):
        """What reads parts of a tensor, by slices for each dimension."""
        return self.file(self.names[name]).get_slice(name)


def is_sharded(tensor):
    """Whether a tensor is a DTensor. (Its class isn't imported: models run without torch.distributed.)"""
    return hasattr(tensor, "placements")


def _converted(tensor, device, dtype):
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _own_part(whole, like, device, dtype, order=None):
    """The DTensor of which this rank holds what `like` says, of `whole`, something that slices are read from. order: [(begin, end)] of the rows of `whole`,
    where the DTensor has them in another order (see terrazzo.distributed.tensor_parallel)."""
    (chunk,) = like.__create_chunk_list__()
    first, *others = [slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes)]
    if 0 in chunk.sizes:  # nothing is here; one number tells the dtype
        local = whole[(slice(1),) * like.dim()].new_empty(chunk.sizes)
    else:
        local = torch.cat([whole[(rows, *others)] for rows in ([first] if order is None else _cut(order, first))]).contiguous()
    local = _converted(local, device or like.device_mesh.device_type, dtype)
    found = type(like).from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
    found.in_rank_order = order is not None
    return found


def _cut(order, rows):
    """Slices of rows.start to rows.stop of the rows that the pieces of `order`, [(begin, end)], make one after another."""
    at = 0
    for begin, end in order:
        low, high = max(begin, begin + rows.start - at), min(end, begin + rows.stop - at)
        at += end - begin
        if low < high:
            yield slice(low, high)


def listed(names):
    names = list(names)
    return ", ".join(map(str, names[:NAMED])) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


class Pretrained(nn.Module):
    """A model that reads and writes transformers' checkpoints; the names of its tensors are transformers' own.

    Subclasses name their `Config`, whose from_hf and to_hf translate config.json, and their `model_types`.
    """

    Config = None
    model_types = ()
    optional = {}       # name -> f(config): tensors that a checkpoint may lack
    surplus_allowed = ()  # ends of names of tensors that some checkpoints hold and no model needs

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, shard=None):
        """The model in a directory with config.json and safetensors, in evaluation mode.

        Args:
            path: the directory, such as a snapshot of a model hub.
            dtype: of all floating-point tensors; None keeps each as it is stored.
            device: where they go; None is the CPU, for sharded tensors their mesh's device.
            shard: f(model), which shards the model over ranks in place while its tensors are on the meta device, such as
                `lambda model: expert_parallel(model, mesh)` or FSDP2's fully_shard on its blocks. Every rank calls from_pretrained, and reads
                of each sharded tensor (DTensor) its own part alone. None: nothing is sharded.

        Raises: FileNotFoundError, ValueError: a file is missing or no safetensors, or tensors are missing, surplus or of
            another shape than config.json says: all of them are named, and nothing is loaded.
        """
        fn = f"terrazzo.{cls.__name__}.from_pretrained"
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"{fn}: dtype must be a floating-point torch.dtype or None, got {dtype!r}")
        checkpoint = Checkpoint(fn, path)
        config = read_json(fn, Path(path) / CONFIG)
        check_model_type(fn, config, cls.model_types)
        if shard is not None and not callable(shard):
            raise TypeError(f"{fn}: shard must be a function of the model or None, got {type(shard).__name__}")
        with torch.device("meta"):
            model = cls(cls.Config.from_hf(config))
        if shard is not None:
            shard(model)
        model.load_state_dict(model._tensors(fn, checkpoint, dtype, device), assign=True, strict=True)
        model.tie_weights()
        if (Path(path) / GENERATION).exists():
            model.generation_config = read_json(fn, Path(path) / GENERATION)
        return model.eval()

    def _tensors(self, fn, checkpoint, dtype, device):
        state = self.state_dict()
        wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for tied in self.tied():
            if tied not in checkpoint.names:
                wanted.pop(tied)
        missing = [name for name in wanted if name not in checkpoint.names and name not in self.optional]
        surplus = [name for name in checkpoint.names if name not in wanted and name not in self.tied() and not name.endswith(self.surplus_allowed)]
        wrong = [f"{name} {checkpoint.shape(name)}, not {shape}" for name, shape in wanted.items()
                 if name in checkpoint.names and checkpoint.shape(name) != shape]  # fmt: skip
        problems = [f"{what}: {listed(names)}" for what, names in (("missing", missing), ("surplus", surplus), ("wrong shape", wrong)) if names]
        if problems:
            raise ValueError(f"{fn}: {checkpoint.folder} does not fit its config.json; " + "; ".join(problems))
        tensors = {}
        for name in wanted:
            stored = name in checkpoint.names
            like, order = getattr(state[name], "in_ranks", (state[name], None))
            if is_sharded(like):
                tensors[name] = _own_part(checkpoint.slices(name) if stored else self.optional[name](self.config), like, device, dtype, order)
            else:
                tensors[name] = _converted(checkpoint[name] if stored else self.optional[name](self.config), device, dtype)
        for tied, source in self.tied().items():
            tensors.setdefault(tied, tensors[source])
        return tensors

    def tied(self):
        """{name: the name whose tensor it shares}."""
        return {}

    def tie_weights(self):
        for name, source in self.tied().items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, self.get_parameter(source))

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    @property
    def device(self):
        return next(self.parameters()).device

    def save_pretrained(self, folder, dtype=None, max_shard_bytes=5_000_000_000):
        """Writes config.json and safetensors (shards above max_shard_bytes) that from_pretrained and transformers read.

        Where tensors are sharded over ranks, every rank of the job calls it: tensors are gathered one after another, and rank 0 writes.
        """
        folder = Path(folder)
        state = {name: tensor for name, tensor in self.state_dict().items() if name not in self.tied()}
        sizes = {name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in state.items()}
        shards = [[]]
        for name, size in sizes.items():
            if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_shard_bytes:
                shards.append([])
            shards[-1].append(name)
        files = [WEIGHTS] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        sharded = any(map(is_sharded, state.values()))
        writes = not sharded or torch.distributed.get_rank() == 0
        for file, names in zip(files, shards):
            _write(folder, file, {name: state[name] for name in names}, dtype, writes)
        if writes:
            self._write_rest(folder, dict(zip(files, shards)), sum(sizes.values()))
        if sharded:
            torch.distributed.barrier()  # nobody reads what isn't there yet

    def _write_rest(self, folder, files, total):
        """The index of several files {file: names}, config.json, generation_config.json; files of an earlier model go."""
        for old in (*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / INDEX):
            if old.name not in files:
                old.unlink(missing_ok=True)
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
        (folder / CONFIG).write_text(json.dumps(self.config.to_hf(), indent=2) + "\n")
        if getattr(self, "generation_config", None):
            (folder / GENERATION).write_text(json.dumps(self.generation_config, indent=2) + "\n")


def _write(folder, file, tensors, dtype, writes):
    """One file of safetensors. Ranks that don't write take part in gathering."""
    from safetensors.torch import save_file

    kept = {}
    for name, tensor in tensors.items():
        whole = tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()
        if writes:
            kept[name] = whole.to("cpu", dtype or tensor.dtype).contiguous()
    if writes:
        # Not onto the file itself: a model that was loaded from this very directory has it mapped.
        folder.mkdir(parents=True, exist_ok=True)
        save_file(kept, folder / f"{file}.partial", {"format": "pt"})
        os.replace(folder / f"{file}.partial", folder / file)
