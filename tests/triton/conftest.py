"""Triton kernels without a GPU. test_interpreted.py runs them in Triton's interpreter, the rest compiles them: two processes.

    TRITON_INTERPRET=1 pytest tests/triton      # the interpreter
    pytest tests/triton                         # the compiler
"""
from terrazzo.triton_kernels import runtime

INTERPRETED = ["test_interpreted.py", "test_interpreted_moe.py", "test_interpreter.py"]


def pytest_ignore_collect(collection_path):
    if collection_path.name.startswith("test_"):
        return (collection_path.name in INTERPRETED) != runtime.interpreting()
    return None


def pytest_report_header(config):
    return "triton kernels: " + ("interpreted" if runtime.interpreting() else "compiled; TRITON_INTERPRET=1 runs the interpreted tests")
