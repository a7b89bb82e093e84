"""Methods rebuilt to look up other globals: what lets terrazzo.patch change one model and not its class.

A method that calls `causal_conv1d_fn` compiles to a lookup of that name in its module. `renamed` copies the function
with the name exchanged for an alias, in the code of every layer of a decorated one, and leaves the module's dictionary
in place: later changes to other globals are seen, and torch.compile guards the alias like any global.
"""
import dis
import functools
import inspect
import types


@functools.cache
def globals_called(cls, module_name):
    """Names of the module's globals that the methods of `cls` look up."""
    names = set()
    for _, method in methods(cls, module_name):
        for function in _layers(method):
            if function.__globals__.get("__name__") == module_name:
                names.update(_code_names(function.__code__))
    return frozenset(names)


def methods(cls, module_name):
    """(name, function) of each method of `cls` that the module's classes, or user classes below them, define."""
    own = [base.__module__ == module_name for base in cls.__mro__]
    owners = cls.__mro__[: len(own) - own[::-1].index(True)]
    for attribute in dict.fromkeys(name for owner in owners for name in vars(owner)):
        value = inspect.getattr_static(cls, attribute)
        if isinstance(value, types.FunctionType):
            yield attribute, value


def _layers(function):
    """A decorated function, outermost layer first: each wrapper closes over the next."""
    found = [function]
    for layer in found:
        inner = [_contents(cell) for cell in layer.__closure__ or ()]
        found += [value for value in inner if isinstance(value, types.FunctionType) and value not in found]
    return found


def _contents(cell):
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _code_names(code):
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code_names(constant)


def renamed_methods(cls, modeling, aliases):
    """{attribute: copy} of the methods of `cls` that look up a name of `aliases` in the module `modeling`."""
    return {
        attribute: renamed(method, modeling, aliases)
        for attribute, method in methods(cls, modeling.__name__)
        if any(aliases.keys() & set(_code_names(layer.__code__)) for layer in _layers(method))
    }


def renamed(function, modeling, aliases):
    """A copy of `function` that looks up the aliased names; a decorated one is copied layer by layer."""
    layers = _layers(function)
    copies = {}  # id of a layer -> its copy
    for layer in reversed(layers):  # innermost first
        inner = [(cell, copies.get(id(_contents(cell)))) for cell in layer.__closure__ or ()]
        cells = tuple(cell if copy is None else types.CellType(copy) for cell, copy in inner)
        code = _renamed_code(layer.__code__, aliases) if layer.__globals__ is vars(modeling) else layer.__code__
        copy = types.FunctionType(code, layer.__globals__, layer.__name__, layer.__defaults__, cells or None)
        for attribute in ("__kwdefaults__", "__qualname__", "__module__", "__doc__"):
            setattr(copy, attribute, getattr(layer, attribute))
        copy.__dict__.update(layer.__dict__)
        copies[id(layer)] = copy
    return copies[id(function)]


def _renamed_code(code, aliases):
    constants = tuple(_renamed_code(c, aliases) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    if not aliases.keys() & set(code.co_names):
        same = all(new is old for new, old in zip(constants, code.co_consts))
        return code if same else code.replace(co_consts=constants)
    for instruction in dis.get_instructions(code):
        if instruction.opname not in ("LOAD_GLOBAL", "LOAD_CONST") and instruction.argval in aliases:
            raise ValueError(f"{code.co_name} uses {instruction.argval} otherwise than by calling it")
    return code.replace(co_names=tuple(aliases.get(name, name) for name in code.co_names), co_consts=constants)
