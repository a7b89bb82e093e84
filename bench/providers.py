"""Kernels of users, kernels of other packages, and users' own shapes, in the suite's cases.

    @terrazzo.bench.provider("my_conv", op="causal_conv1d")
    def my_conv(x, weight, bias): ...

A function takes the inputs of a case by name. Cases whose inputs it does not take become rows that say so. Nothing heavy is
imported here: `terrazzo.bench.provider` is meant for users' modules.
"""
import functools
import importlib.util
import inspect
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

REGISTERED = {}  # name -> UserKernel


@dataclass(frozen=True)
class UserKernel:
    name: str
    op: str      # a name of suite.OPS, or the function of a case
    fn: object
    file: str
    parameters: tuple[str, ...] = field(init=False)
    takes_any: bool = field(init=False)

    def __post_init__(self):
        parameters = inspect.signature(self.fn).parameters.values()
        object.__setattr__(self, "takes_any", any(p.kind is p.VAR_KEYWORD for p in parameters))
        object.__setattr__(self, "parameters", tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)))

    def serves(self, case):
        return self.op in (case.family, case.op)

    def why_not(self, names, arguments=()):
        """Why a case with inputs of these names, and these arguments besides, is not for it, or None."""
        required = {name for name, p in inspect.signature(self.fn).parameters.items() if p.default is p.empty and name in self.parameters}
        if required <= {*names, *arguments} and (self.takes_any or set(names) <= set(self.parameters)):
            return None
        return f"{self.name} takes {', '.join(self.parameters)}; this case gives {', '.join((*names, *arguments))}"

    def bound(self, names, arguments):
        """The kernel with the arguments that it asks for by name; it is called with the inputs."""
        wanted = {name: value for name, value in arguments.items() if name in self.parameters and name not in names}
        return functools.partial(self.fn, **wanted) if wanted else self.fn


def provider(name, *, op):
    """Decorator: measures the function as provider `name` in every case of `op`, a name of `terrazzo bench --help` or a public function's.

    It gets the inputs of a case by name, those of the function's other arguments that it asks for (window, eps, num_experts, …), and
    returns what the op returns; in mode "bwd" the suite differentiates it. It is held to the
    accuracy of a peer: NMSE of 1e-7 (fp32), 1e-4 (fp16), 1e-3 (bf16) against float64.
    """

    def register(fn):
        file = inspect.getsourcefile(fn) or ""
        known = REGISTERED.get(name)
        if known is not None and (known.file, known.fn.__qualname__) != (file, fn.__qualname__):
            raise ValueError(f"terrazzo.bench.provider: {name!r} is {known.fn.__qualname__} of {known.file} already; take another name")
        from . import suite

        if op not in suite.OPS and op not in suite.functions():
            raise ValueError(f"terrazzo.bench.provider: op of {name!r} must be one of {', '.join((*suite.OPS, *suite.functions()))}, got {op!r}")
        if name in suite.PROVIDERS:
            raise ValueError(f"terrazzo.bench.provider: {name!r} is a provider of the suite; take another name")
        REGISTERED[name] = UserKernel(name, op, fn, file)
        return fn

    return register


def load(path):
    """Runs a Python file, which registers its kernels."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"terrazzo bench: --load must name a Python file, got {path}")
    found = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)


def of_case(case):
    """Every provider of a case: its own, other packages', users'."""
    from . import packages
    from .cases import Provider, Unavailable

    def users(kernel):
        def build():
            names = tuple(name for name in case.inputs(0) if name != "grad")
            why = kernel.why_not(names, case.arguments)
            if why:
                raise Unavailable(why)
            return kernel.bound(names, case.arguments)

        return build

    return (*case.providers, *packages.providers(case), *(Provider(kernel.name, users(kernel)) for kernel in REGISTERED.values() if kernel.serves(case)))


# ---- shapes ----------------------------------------------------------------------------------------------------


def _all(values):
    return tuple(values) if isinstance(values, (list, tuple)) else (values,)


# op -> what its module's SIZES hold, from named dimensions
SHAPES = {
    "causal_conv1d": lambda D, L=(), batch=(): (D, D, _all(L), _all(batch)),
    "chunk_scan": lambda H, P, N, L: (H, P, tuple(itertools.product(_all(L), _all(N)))),
    "state_update": lambda H, P, N, batch: (H, P, tuple(itertools.product(_all(batch), _all(N)))),
    "rmsnorm_gated": lambda D, rows: (D, _all(rows)),
    "grouped_gemm": lambda E, K, N, rows: (E, tuple(itertools.product(_all(K), _all(N))), _all(rows)),
    "moe": lambda D, F, E, A, T: (((D, F, E, A), _all(T)),),
    "linear": lambda K, N, M: (tuple(itertools.product(_all(K), _all(N))), _all(M)),
    "patch_reduce": lambda L, D: tuple(itertools.product(_all(L), _all(D))),
    "patch_cross_attention": lambda H, P, L: ((H, P, _all(L)),),
    "local_attention": lambda H, P, window, L, Hk=None: ((H, Hk or H, P, window, _all(L)),),
    "entropy_patch": lambda L: _all(L),
    "byte_hash_embedding": lambda L, D, V=20011: tuple((length, width, V) for length in _all(L) for width in _all(D)),
}
LISTS = {"L", "N", "K", "M", "T", "D", "batch", "rows"}  # dimensions that may be lists where SHAPES takes them all
SINGLE = {("causal_conv1d", "D"), ("rmsnorm_gated", "D"), ("moe", "D")}


def _entry(entry, where):
    """(op, SIZES entry) of one object of a shapes file."""
    if not isinstance(entry, dict) or entry.get("op") not in SHAPES:
        raise ValueError(f"{where}: op must be one of {', '.join(SHAPES)}, got {entry.get('op') if isinstance(entry, dict) else entry!r}")
    op, dims = entry["op"], {k: v for k, v in entry.items() if k != "op"}
    parameters = inspect.signature(SHAPES[op]).parameters
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in dims]
    unknown = [name for name in dims if name not in parameters]
    if missing or unknown:
        raise ValueError(f"{where}: {op} takes {', '.join(parameters)}; missing: {', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}")
    for name, value in dims.items():
        lists = name in LISTS and (op, name) not in SINGLE
        numbers = value if lists and isinstance(value, list) and value else [value]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers):
            raise ValueError(f"{where}: {name} of {op} must be a positive whole number{' or a list of them' if lists else ''}, got {value!r}")
    return op, SHAPES[op](**dims)


def shapes(path):
    """Adds the shapes of a JSON file to the ops' sizes -> the names of the presets that they make.

    The file is a list of {"op": name, dimension: number or list, …}; SHAPES names the dimensions of each op.
    """
    from . import moe, suite

    try:
        entries = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"terrazzo bench: --shapes {path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"terrazzo bench: --shapes {path} must hold a list of objects such as " '{"op": "causal_conv1d", "D": 4096, "L": [512, 2048]}')
    presets = []
    for number, entry in enumerate(entries):
        op, size = _entry(entry, f"terrazzo bench: --shapes {path}, entry {number}")
        preset = f"{path}#{number}"
        suite.OPS[op].SIZES[preset] = size
        if op == "moe":
            moe.ROUTE_SIZES[preset] = tuple((T, entry["E"], entry["A"]) for T in _all(entry["T"]))
        presets.append(preset)
    return tuple(presets)
