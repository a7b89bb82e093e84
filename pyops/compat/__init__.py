"""Upstream's packages on terrazzo's ops: causal_conv1d, mamba_ssm and grouped_gemm under their own module paths and signatures.

    from terrazzo.compat.causal_conv1d import causal_conv1d_fn      # explicitly, or
    terrazzo.compat.install()                                       # under upstream's names
    from causal_conv1d import causal_conv1d_fn

After install(), transformers' own fast path finds the functions on any device, packed sequences included. It binds
them when a modeling file is imported: call install() before that (or use terrazzo.patch, which works any time).
"""
import importlib
import importlib.util
import os
import sys
import warnings

PACKAGES = {
    "causal_conv1d": ("causal_conv1d_interface", "causal_conv1d_varlen"),
    "mamba_ssm": (
        "ops.triton.ssd_combined",
        "ops.triton.selective_state_update",
        "ops.triton.layernorm_gated",
    ),
    "grouped_gemm": ("ops", "backend"),
}


class Installed:
    """What install() put into sys.modules (`names`) and left alone (`present`); undo() takes it out again."""

    def __init__(self, modules, present):
        self._modules = modules
        self.present = present

    @property
    def names(self):
        return sorted(self._modules)

    def undo(self):
        """Removes the modules from sys.modules; code that has imported from them keeps what it has."""
        for name, module in self._modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        self._modules = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.undo()

    def __repr__(self):
        return f"<terrazzo.compat.install: {', '.join(self.names) or 'nothing'}; already there: {self.present or 'none'}>"


def install():
    """Makes `causal_conv1d`, `mamba_ssm` and `grouped_gemm` importable where the real packages are absent.

    Returns:
        a handle with `.names`, `.present` (packages found and left alone) and `.undo()`; also a context manager.
    """
    modules, present = {}, []
    for package, submodules in PACKAGES.items():
        if package in sys.modules or importlib.util.find_spec(package) is not None:
            present.append(package)
            continue
        before = set(sys.modules)
        _load(package)
        for submodule in submodules:
            importlib.import_module(f"{package}.{submodule}")
        modules.update({name: sys.modules[name] for name in set(sys.modules) - before if name.split(".")[0] == package})
    if modules:
        _warn_about_bound_models()
    return Installed(modules, present)


def _load(package):
    """Imports terrazzo/compat/<package> under upstream's name: a module of its own, with its own spec."""
    folder = os.path.join(os.path.dirname(__file__), package)
    spec = importlib.util.spec_from_file_location(
        package, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[package] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[package]
        raise


def _warn_about_bound_models():
    from ..recipes import BY_MODULE

    bound = [key for module, key in BY_MODULE.items() if module in sys.modules]
    if bound:
        warnings.warn(
            f"terrazzo.compat.install: transformers has already imported {', '.join(bound)}, with functions of its own; "
            "call install() before that, or use terrazzo.patch(model)",
            stacklevel=3,
        )
