"""Triton kernels in two processes: test_numerics.py runs them in Triton's interpreter (or on a GPU), the rest compiles them.

    TRITON_INTERPRET=1 pytest tests/triton      # the interpreter
    pytest tests/triton                         # the compiler; with a GPU also the numerics, there
"""
import torch
from terrazzo.triton_kernels import runtime

NUMERICS, INTERPRETER = "test_numerics.py", "test_interpreter.py"


def pytest_ignore_collect(collection_path):
    if not collection_path.name.startswith("test_"):
        return None
    if runtime.interpreting():
        return collection_path.name not in (NUMERICS, INTERPRETER)
    return collection_path.name == INTERPRETER or (collection_path.name == NUMERICS and not torch.cuda.is_available())


def pytest_report_header(config):
    where = "interpreted" if runtime.interpreting() else "compiled; TRITON_INTERPRET=1 runs the numeric tests without a GPU"
    return f"triton kernels: {where}"
