"""Every argument of every op replaced by things that it is not: a clear error or a result, never a crash, never a changed argument."""
import pytest
import terrazzo
import torch
from terrazzo import cases

FIRST = {case.op: case for case in reversed(cases.CASES)}


def replacements(value, alone):
    """name -> (what stands in an argument's place, whether it must be refused). A tensor that stands alone may be on any device."""
    yield "object", (object(), True)
    for name, other in (("None", None), ("negative", -1), ("zero", 0), ("one half", 0.5), ("NaN", float("nan")), ("list", [1, 2]), ("scalar", torch.tensor(3.0)),
                        ("nothing", torch.empty(0)), ("no integers", torch.empty(0, dtype=torch.int32)), ("True", True)):  # fmt: skip
        yield name, (other, False)
    yield "text", ("abc", True)
    if not isinstance(value, torch.Tensor):
        return
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.int16, torch.bool):
        yield str(dtype), (value.to(dtype), False)
    yield "complex", (value.to(torch.complex64), True)
    yield "array", (value.float().numpy(), True)
    yield "meta", (value.to("meta"), not alone)
    if value.dim():
        yield "sparse", (value.to_sparse(), True)
        for name, other in (("one less", value[:-1]), ("one less behind", value[..., :-1]), ("none", value[:0]), ("none behind", value[..., :0]),
                            ("twice", torch.cat([value, value])), ("flat", value.flatten()), ("transposed", value.transpose(0, -1)),
                            ("expanded", value[:1].expand(value.shape)), ("backwards", value.flip(0))):  # fmt: skip
            yield name, (other, False)
        yield "one dimension more", (value[None], False)
    if value.dtype in (torch.int32, torch.int64):
        limits = torch.iinfo(value.dtype)
        for name, other in (("all largest", torch.full_like(value, limits.max)), ("all smallest", torch.full_like(value, limits.min)), ("less 5", value - 5)):
            yield name, (other, False)


def same(a, b):
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) if a.is_floating_point() else torch.equal(a, b)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", FIRST)
def test_hostile_arguments(op, backend):
    case, function = FIRST[op], getattr(terrazzo, op)
    good = case.make(torch.float32)
    alone = sum(isinstance(value, torch.Tensor) for value in good.values()) == 1
    wrong = []
    for argument, value in good.items():
        for name, (other, refused) in replacements(value, alone):
            kwargs = case.make(torch.float32) | {argument: other}
            before = {k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu" and v.layout is torch.strided}
            error = None
            try:
                with torch.no_grad():
                    function(**kwargs, backend=backend)
            except Exception as caught:
                error = caught
                if not isinstance(error, (ValueError, TypeError, terrazzo.BackendError)) or f"terrazzo.{op}: " not in str(error):
                    wrong.append(f"{argument} = {name}: {type(error).__name__}: {str(error)[:100]}")
            if refused and error is None:
                wrong.append(f"{argument} = {name} was accepted")
            for k, v in before.items():
                if (error is not None or k not in case.updated) and not same(kwargs[k], v):
                    wrong.append(f"{argument} = {name} changed {k}")
    assert not wrong, "\n".join(wrong)
