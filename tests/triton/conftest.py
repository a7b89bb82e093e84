"""Triton kernels in two processes: test_numerics*.py run them in Triton's interpreter (or on a GPU), the rest compiles them.

    TRITON_INTERPRET=1 pytest tests/triton      # the interpreter
    pytest tests/triton                         # the compiler; with a GPU also the numerics, there
"""
import torch
from terrazzo.triton_kernels import runtime


def pytest_ignore_collect(collection_path):
    name = collection_path.name
    if not name.startswith("test_"):
        return None
    if runtime.interpreting():
        return not name.startswith(("test_numerics", "test_interpreter"))
    return name == "test_interpreter.py" or (name.startswith("test_numerics") and not torch.cuda.is_available())


def pytest_report_header(config):
    where = "interpreted" if runtime.interpreting() else "compiled; TRITON_INTERPRET=1 runs the numeric tests without a GPU"
    return f"triton kernels: {where}"
