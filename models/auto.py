"""A checkpoint's model by the model_type in its config.json; the models that are shipped with terrazzo by their names."""
from importlib import import_module
from pathlib import Path

from .loading import CONFIG, read_json

FN = "terrazzo.models.from_pretrained"
MODELS = {"bamba": "Bamba", "blenderbot": "Blenderbot", "blt": "Blt", "dbrx": "Dbrx"}  # model_type -> class; the module has the type's name
SHIPPED = {path.name.replace("_", "-"): path for path in sorted(Path(__file__).parent.glob("tiny_*")) if (path / CONFIG).exists()}


def locate(path):
    """The directory of a checkpoint, or of a shipped model by its name."""
    if str(path) in SHIPPED and not Path(path).exists():
        return SHIPPED[str(path)]
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{FN}: there is no model {str(path)!r}: no such directory, and shipped are {', '.join(SHIPPED) or 'none'}; "
                                f"give a directory with {CONFIG} and safetensors, such as a snapshot of a model hub")  # fmt: skip
    return Path(path)


def from_pretrained(path, dtype=None, device=None, shard=None):
    """The model of the class that config.json's model_type says.

    Args:
        path: a directory with config.json and safetensors, or the name of a shipped model, such as "tiny-bamba".
        dtype, device, shard: as for the classes' own from_pretrained.

    Raises: FileNotFoundError: no such directory or file. ValueError: a model_type that no class reads, or tensors that don't fit.
    """
    folder = locate(path)
    kind = read_json(FN, folder / CONFIG).get("model_type")
    if kind not in MODELS:
        raise ValueError(f"{FN}: config.json must have a model_type of {', '.join(MODELS)}, got {kind!r}")
    return getattr(import_module(f"{__package__}.{kind}"), MODELS[kind]).from_pretrained(folder, dtype, device, shard)
