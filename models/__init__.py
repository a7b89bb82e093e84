"""Models built on terrazzo's ops; each is imported when it is first asked for."""

LAZY = {
    "Bamba": "bamba", "BambaConfig": "bamba",
    "Blt": "blt", "BltConfig": "blt_config",
    "Blenderbot": "blenderbot", "BlenderbotConfig": "blenderbot",
    "Dbrx": "dbrx", "DbrxConfig": "dbrx",
    "EntropyConfig": "entropy_model", "EntropyModel": "entropy_model",
    "Tokenizer": "tokenizer", "from_pretrained": "auto",
}  # fmt: skip
__all__ = sorted(LAZY)


def __getattr__(name):
    if name not in LAZY:
        raise AttributeError(f"module 'terrazzo.models' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
