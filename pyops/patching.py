"""terrazzo.patch: a Hugging Face model runs on terrazzo's ops, and can be put back.

How: transformers' mixers call module-level functions (causal_conv1d_fn, mamba2_chunk_scan, ...) by name; norms,
experts, attention and linear layers are replaced by their forward or another method.
  instance scope   a mixer gets a subclass of its class whose methods look those names up under an alias
                   (`_terrazzo_causal_conv1d_fn_auto`) in the same module; nothing else of the object changes: no
                   attribute, no parameter, no state_dict key. Other models stay as they are. Copies and pickles of a
                   patched module stay patched.
  class scope      the functions themselves, and the methods, are replaced in transformers' module: every model of
                   the type, made before or after. torch's linear layers are left alone there.
undo() gives back the very same class and function objects; handles may overlap and be undone in any order.
"""
import functools
import importlib
import inspect
import json
import os
import re
import sys
import types
import weakref
from collections import Counter
from dataclasses import dataclass
from itertools import count

import torch
from torch import nn

from . import adapters, adapters_blt, dispatch, rebinding
from .recipes import ANYWHERE, BY_MODULE, INTERFACE, RECIPES, SUPPORTED, VERSIONS, modeling_name


GAINS = {"linear": "linear layers", "attention": "attention"}  # kinds of ANYWHERE that are replaced where that gains something, in a model alone
FAMILIES = {"mamba_split_conv1d_scan_combined": "chunk_scan"}  # of ops that dispatch doesn't know: this one only calls others


class PatchError(RuntimeError):
    """The installed transformers, or this model, isn't what the recipe was written for."""


@dataclass(frozen=True)
class Row:
    """One line of a report: backend is what will run, "transformers" where its own code stays, with the reason."""

    module: str
    op: str
    backend: str
    note: str = ""


class Report(list):
    """The rows of a patch; prints as a table that folds the layers of a model into one line."""

    def __str__(self):
        if not self:
            return "nothing to patch"
        times = Counter((_folded(row), row.op, row.backend, row.note) for row in self)
        table = [("modules", "", "op", "backend", "note")]
        table += [(module, f"x{n}", op, backend, note) for (module, op, backend, note), n in times.items()]
        widths = [max(len(line[i]) for line in table) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(line, widths)), line[4]]).rstrip() for line in table]
        return "\n".join([lines[0], "-" * min(max(map(len, lines)), 120), *lines[1:]])


def _folded(row):
    return "nn.Linear" if row.op == "linear" else re.sub(r"\b\d+\b", "*", row.module)


class Handle:
    """What patch() did: report() says it, undo() reverts it, and `with patch(model):` undoes it at the end."""

    def __init__(self, rows, targets):
        self._rows = rows
        self._targets = targets
        self._token = next(_tokens)
        self.active = False

    def report(self):
        return Report(self._rows)

    def _apply(self):
        try:
            for target in self._targets:
                target.add(self._token)
        except Exception:
            self._remove()
            raise
        self.active = bool(self._targets)
        return self

    def _remove(self):
        for target in reversed(self._targets):
            target.remove(self._token)

    def undo(self):
        """Puts everything back as it was before this patch; a second call does nothing."""
        if self.active:
            self._remove()
            self.active = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.undo()

    def __repr__(self):
        return f"<terrazzo.patch: {len(self._targets)} patched, {'active' if self.active else 'not active'}>"


_tokens = count(1)


def patch(model_or_model_type, ops="all", backend=None, strict=True, *, scope=None, dry_run=False):
    """Makes a Hugging Face model run on terrazzo's ops; the numbers stay the same to rounding.

    Args:
        model_or_model_type: a model (any nn.Module that contains transformers' mixers or experts, or linear layers in
            16 bits on a CPU without instructions for them), a model type such as "bamba", or a directory with a
            config.json.
        ops: "all", or names of public ops and op families to replace, e.g. ["causal_conv1d", "rmsnorm_gated"].
        backend: forces one backend for the patched calls; None chooses per call, and leaves to transformers the
            calls that no native backend serves.
        strict: raise where a recipe doesn't fit the installed transformers or the model; False reports it and
            leaves that part alone.
        scope: "instance" (this model alone; the default for a model) or "class" (every model of its type; the
            default for a model type).
        dry_run: only report.

    Returns:
        a Handle: `.report()`, `.undo()`, usable as a context manager.

    Raises:
        ValueError: an unsupported model type (the message lists the supported ones), an unknown op or scope.
        PatchError: with strict, a recipe that doesn't match.
    """
    is_model = isinstance(model_or_model_type, nn.Module)
    if not is_model and not isinstance(model_or_model_type, (str, os.PathLike)):
        raise TypeError(f"terrazzo.patch: expected a model, a model type or the path of a checkpoint, got {model_or_model_type!r}")
    if scope is None:
        scope = "instance" if is_model else "class"
    if scope not in ("instance", "class"):
        raise ValueError(f"terrazzo.patch: scope must be 'instance' or 'class', got {scope!r}")
    if scope == "instance" and not is_model and not dry_run:
        raise ValueError(f"terrazzo.patch: scope 'instance' needs a model, got {model_or_model_type!r}; pass the model")
    wanted = _wanted_ops(ops)
    if not dry_run:
        register_experts()
    if is_model:
        sites = _sites_of_model(model_or_model_type, strict, backend)
    else:
        sites = _sites_of_types(_recipe_keys(model_or_model_type, strict))
    rows, targets = [], {}
    for site in sites:
        shadowed = _shadowed(site)
        for name, swap in site.swaps.items():
            if swap.op not in wanted:
                continue
            problem = (_problem_anywhere(name) if name in ANYWHERE else _problem(site.key)) or shadowed
            if name in GAINS:
                row = _gain_row(site, swap, backend, scope, problem)
                rows.append(row)
                if row.backend != "transformers":
                    targets.setdefault(site.path, _Instance(site.module)).chosen[name] = backend
                continue
            if problem:
                if strict:
                    raise PatchError(f"terrazzo.patch: {site.path}: {problem}; pass strict=False to leave it alone")
                rows.append(Row(site.path, swap.op, "transformers", problem))
                continue
            rows.append(_row(site, swap, backend))
            if scope == "instance":
                targets.setdefault(site.path, _Instance(site.module)).chosen[name] = backend
            else:
                owner, attribute = _global_name(site, name)
                targets[owner, attribute] = _Global(owner, attribute, swap, backend)
        rows += [Row(site.path, name, "transformers", why) for name, why in site.left.items()]
    handle = Handle(rows, list(targets.values()))
    return handle if dry_run else handle._apply()


def _wanted_ops(ops):
    known = {}
    recipes = [*RECIPES.values()]
    swaps = [swap for recipe in recipes for swap in [*recipe.functions.values(), *recipe.methods.values()]]
    for swap in (*swaps, *ANYWHERE.values()):
        family = dispatch.OPS[swap.op].family if swap.op in dispatch.OPS else FAMILIES.get(swap.op, swap.op)
        for name in (swap.op, family):
            known.setdefault(name, set()).add(swap.op)
    if ops == "all":
        return set().union(*known.values())
    names = [ops] if isinstance(ops, str) else list(ops)
    for name in names:
        if name not in known:
            raise ValueError(f"terrazzo.patch: unknown op {name!r}; ops and families are {', '.join(sorted(known))}")
    return set().union(*(known[name] for name in names))


def register_experts():
    """Makes `experts_implementation="terrazzo"` known to transformers; terrazzo.patch does it too.

    For models loaded or switched that way (`model.set_experts_implementation("terrazzo")`) every class of experts
    behind transformers' ExpertsInterface runs on terrazzo; what no native backend can serve runs as "grouped_mm".

    Raises:
        PatchError: the installed transformers has another ExpertsInterface.
    """
    problem = _problem_anywhere("experts")
    if problem:
        raise PatchError(f"terrazzo.patching.register_experts: {problem}")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if "terrazzo" not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register("terrazzo", adapters.experts(ALL_EXPERTS_FUNCTIONS["grouped_mm"], None))


# ---- what there is to patch ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    """One module of a model, or one class of a type (module None), and what its recipe replaces in it."""

    key: str
    path: str
    cls: type
    module: nn.Module | None
    swaps: dict
    left: dict


def _site(path, cls, module=None):
    """The site of a module or class in which there is something to replace; None for any other."""
    cls = _plain(cls)
    base = _recipe_base(cls)
    key = base and BY_MODULE[base.__module__]
    swaps, left = {}, {}
    if key:
        recipe = RECIPES[key]
        called = rebinding.globals_called(cls, base.__module__)
        classes = {owner.__name__ for owner in cls.__mro__}
        swaps = {name: swap for name, swap in recipe.functions.items() if name in called}
        swaps |= {name: swap for name, swap in recipe.methods.items() if name.partition(".")[0] in classes}
        left = {name: why for name, why in recipe.left.items() if name in (called if name.islower() else classes)}
    if _is_experts(cls):
        swaps["experts"] = ANYWHERE["experts"]
    elif cls is nn.Linear:
        swaps["linear"] = ANYWHERE["linear"]
    elif not swaps and _attention_file(cls):
        swaps["attention"] = ANYWHERE["attention"]
    return _Site(key, path, cls, module, swaps, left) if swaps or left else None


def _recipe_base(cls):
    """The class nearest to `cls` that a modeling file with a recipe defines, or None."""
    return next((base for base in cls.__mro__ if base.__module__ in BY_MODULE), None)


def _is_experts(cls):
    """Whether use_experts_implementation decorated the forward of this class: its wrapper stands in transformers' moe.py."""
    forward = _original(getattr(cls, "forward", None))
    known = getattr(forward, "__globals__", {}).get("__name__") == "transformers.integrations.moe"
    return known and hasattr(cls, "_apply_gate")


@functools.cache
def _attention_file(cls):
    """The modeling file in which the methods of this class look up transformers' AttentionInterface, or None."""
    base = next((base for base in cls.__mro__ if base.__module__.startswith("transformers.models.")), None)
    file = base and sys.modules[base.__module__]
    known = type(vars(file).get(INTERFACE)).__name__ == "AttentionInterface" if file else False
    return file if known and INTERFACE in rebinding.globals_called(cls, base.__module__) else None


def _sites_of_model(model, strict, backend):
    sites = [_site(path or type(module).__name__, type(module), module) for path, module in model.named_modules()]
    sites = [site for site in sites if site is not None]
    if strict and all(site.swaps.keys() <= GAINS.keys() and not site.left for site in sites):
        reasons = {}  # kind -> why, in the order found
        for site in sites:
            for name, swap in site.swaps.items():
                _, chosen, why = adapters.judged(swap, site.cls, site.module, backend)
                if chosen:
                    return sites
                reasons.setdefault(name, {})[why] = None
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        said = [f"its {GAINS[name]}: {'; '.join(why)}" for name, why in reasons.items()]
        raise ValueError(_unsupported(kind) + (f" ({', '.join(said)})" if said else ""))
    return sites


def _sites_of_types(keys):
    sites = []
    for key in keys:
        modeling = importlib.import_module(modeling_name(key))
        for name, cls in vars(modeling).items():
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == modeling.__name__:
                site = _site(name, cls)
                if site is not None:
                    sites.append(site)
    return sites


def _unsupported(kind):
    return f"terrazzo.patch: no recipe for model type {kind!r}; supported: {', '.join(SUPPORTED)}"


def _recipe_keys(model_type, strict):
    """Supported types of a model type or of the config.json of a directory, the sub-models of composite ones included."""
    name = os.fspath(model_type)
    config_file = os.path.join(name, "config.json")
    if os.path.isfile(config_file):
        with open(config_file) as file:
            found = _model_types(json.load(file))
    else:
        found = [name]
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    keys = dict.fromkeys(found)
    for kind in found:
        if kind not in SUPPORTED and kind in CONFIG_MAPPING:
            config = CONFIG_MAPPING[kind]
            keys[config.__module__.split(".")[-2]] = None  # qwen3_5_text lives in the package qwen3_5
            keys.update(dict.fromkeys(_model_types(config().to_dict())))
    keys = [key for key in keys if key in SUPPORTED]
    if not keys and strict:
        raise ValueError(_unsupported(" / ".join(dict.fromkeys(found)) or name))
    return keys


def _model_types(config):
    """Every model_type of a nested config dictionary, outermost first."""
    found = [config["model_type"]] if config.get("model_type") else []
    for value in config.values():
        if isinstance(value, dict):
            found += _model_types(value)
    return found


@functools.cache
def _problem(key):
    """None, or why the installed transformers doesn't fit the recipe."""
    recipe = RECIPES[key]
    modeling = importlib.import_module(modeling_name(key))
    problem = _wrong_version(recipe.versions)
    for name, swap in (recipe.functions | recipe.methods).items():
        present = getattr(modeling, name.partition(".")[0], None)
        if name in recipe.methods:
            present = getattr(present, _method(name), None)
        if present is None:
            problem = problem or f"{modeling.__name__} has no {name}"
        else:
            problem = problem or _wrong_parameters(name, present, swap)
    return problem


def _method(name):
    """The method that a name among a recipe's methods, or in ANYWHERE, stands for."""
    return name.partition(".")[2] or "forward"


@functools.cache
def _problem_anywhere(name):
    """None, or why what is replaced in models of any type isn't as expected."""
    if name == "linear":
        return _wrong_parameters("nn.Linear.forward", nn.Linear.forward, ANYWHERE[name])
    problem = _wrong_version(VERSIONS)
    if problem is not None:
        return problem
    if name == "attention":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward as present
    else:
        from transformers.integrations.moe import grouped_mm_experts_forward as present
    return _wrong_parameters(present.__name__, present, ANYWHERE[name])


def _wrong_version(versions):
    from packaging.version import Version
    from transformers import __version__

    low, high = versions
    if Version(low) <= Version(Version(__version__).base_version) < Version(high):
        return None
    return f"the recipe is for transformers >= {low}, < {high}, not {__version__}"


def _wrong_parameters(name, present, swap):
    parameters = tuple(inspect.signature(_original(present)).parameters)
    if parameters == swap.parameters:
        return None
    return f"{name} takes ({', '.join(parameters)}), the recipe expects ({', '.join(swap.parameters)})"


def _shadowed(site):
    """None, or why calls of this module can't be reached."""
    own = site.module.__dict__ if site.module is not None else {}
    for method in dict.fromkeys(["forward", *map(_method, site.swaps)]):
        if method in own and not (method == "forward" and "_old_forward" in own):  # accelerate's hooks keep the old one there
            return f"its {method} is replaced on the instance"
    return None


def _row(site, swap, backend):
    if swap.adapter == "split_scan":
        return Row(site.path, swap.op, "unfused", "declined: convolution, scan and norm run one by one, padding-safe")
    if swap.op == "use_cache":
        return Row(site.path, swap.op, "without", adapters_blt.NO_CACHE)
    op, chosen, note = adapters.judged(swap, site.cls, site.module, backend)
    return Row(site.path, op, chosen or "transformers", note)


def _gain_row(site, swap, backend, scope, problem):
    """Linear layers and attention are replaced only where that gains something, and never by class: every program has them."""
    if scope == "class":
        problem = f"{GAINS[swap.adapter]}: in instance scope alone"
    return Row(site.path, swap.op, "transformers", problem) if problem else _row(site, swap, backend)


# ---- instance scope: a subclass whose methods look the functions up under an alias --------------------------


def _plain(cls):
    """The class as it was before any patch."""
    return getattr(cls, "_terrazzo_plain", cls)


@functools.cache
def _variant(cls, chosen):
    """The subclass of `cls` that runs `chosen`, a tuple of (replaced name, backend)."""
    base = _recipe_base(cls)
    recipe = RECIPES[BY_MODULE[base.__module__]] if base else None
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "_terrazzo_plain": cls,
        "_terrazzo_chosen": chosen,
    }
    replaced = ANYWHERE | (recipe.methods if recipe else {})
    if recipe:
        modeling, functions = sys.modules[base.__module__], recipe.functions
        aliases = {name: _alias(modeling, name, functions[name], backend) for name, backend in chosen if name in functions}
        namespace |= rebinding.renamed_methods(cls, modeling, aliases)
    for name, backend in chosen:
        if name == "attention":
            file = _attention_file(cls)
            namespace |= rebinding.renamed_methods(cls, file, {INTERFACE: _alias(file, INTERFACE, ANYWHERE[name], backend)})
        elif name in replaced:
            method = _method(name)
            rename = functools.partial(rebinding.renamed, modeling=modeling, aliases=aliases) if method in namespace else None
            namespace[method] = _replaced(replaced[name], backend, inspect.getattr_static(cls, method), rename)
    return type(cls)(cls.__name__, (cls,), namespace)


def _alias(modeling, name, swap, backend):
    """Puts the replacement of a function into its module under a name of its own, which then stays there."""
    alias = f"_terrazzo_{name}_{backend or 'auto'}"
    if alias not in vars(modeling):
        setattr(modeling, alias, _replacement(swap, backend, _original(getattr(modeling, name))))
    return alias


def _reduce(self, protocol):
    """copy, deepcopy and pickle: the variant is made again where the object is."""
    state = object.__reduce_ex__(self, 2)[2]
    return _rebuild, (_plain(type(self)), type(self)._terrazzo_chosen), state


def _rebuild(cls, chosen):
    variant = _variant(cls, chosen)
    return variant.__new__(variant)


class _Instance:
    """A module under instance scope, and what each active handle replaces in it."""

    active = weakref.WeakKeyDictionary()  # module -> {token: {name: backend}}

    def __init__(self, module):
        self.module, self.chosen = module, {}

    def add(self, token):
        self._check_class()
        layers = self.active.setdefault(self.module, {})
        if not layers and _plain(type(self.module)) is not type(self.module):
            layers[0] = dict(type(self.module)._terrazzo_chosen)  # a copy of a patched module: its own floor
        layers[token] = self.chosen
        self._settle()

    def remove(self, token):
        layers = self.active.get(self.module, {})
        if token in layers:
            self._check_class()
            del layers[token]
            self._settle()

    def _check_class(self):
        cls = type(self.module)
        if _plain(cls) is not cls and "_terrazzo_plain" not in vars(cls):
            raise RuntimeError(
                f"terrazzo.patch: {_plain(cls).__name__}'s class was changed to {cls.__name__} after the patch; undo that first"
            )

    def _settle(self):
        merged = {}
        for chosen in self.active[self.module].values():
            merged |= chosen
        plain = _plain(type(self.module))
        self.module.__class__ = _variant(plain, tuple(sorted(merged.items()))) if merged else plain
        hooked = self.module.__dict__.get("_old_forward")
        if isinstance(hooked, types.MethodType) and hooked.__self__ is self.module:
            self.module.__dict__["_old_forward"] = types.MethodType(type(self.module).forward, self.module)


# ---- class scope: the functions of the module themselves ----------------------------------------------------


def _original(function):
    """The function as it was before any patch."""
    return getattr(function, "_terrazzo_original", function)


def _replacement(swap, backend, original):
    module = adapters_blt if swap.adapter.startswith("blt_") else adapters
    function = getattr(module, swap.adapter)(original, backend)
    function._terrazzo_original = original
    return function


def _replaced(swap, backend, found, rename=None):
    """What stands in the place of a function or static method as it was found in its module or class."""
    original = _original(getattr(found, "__func__", found))
    replacement = _replacement(swap, backend, original if rename is None else rename(original))
    return staticmethod(replacement) if isinstance(found, staticmethod) else replacement


def _global_name(site, name):
    """(module or class, attribute) that holds what `name` stands for in a site."""
    if name in ANYWHERE:
        return next(base for base in site.cls.__mro__ if "forward" in vars(base)), "forward"
    modeling = importlib.import_module(modeling_name(site.key))
    if name in RECIPES[site.key].methods:
        return getattr(modeling, name.partition(".")[0]), _method(name)
    return modeling, name


_INHERITED = object()


class _Global:
    """A function of a transformers module, or a method of one of its classes, under class scope."""

    active = {}  # (owner, attribute) -> {0: what was there, token: replacement}

    def __init__(self, owner, attribute, swap, backend):
        self.owner, self.attribute = owner, attribute
        self.replacement = _replaced(swap, backend, inspect.getattr_static(owner, attribute))

    def add(self, token):
        layers = self.active.setdefault((self.owner, self.attribute), {0: vars(self.owner).get(self.attribute, _INHERITED)})
        layers[token] = self.replacement
        self._settle(layers)

    def remove(self, token):
        layers = self.active.get((self.owner, self.attribute), {})
        if layers.pop(token, None) is not None:
            self._settle(layers)
            if len(layers) == 1:
                del self.active[self.owner, self.attribute]

    def _settle(self, layers):
        last = next(reversed(layers.values()))
        if last is _INHERITED:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, last)
