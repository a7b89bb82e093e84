"""The benchmark suite: how much faster, how exact, how far from this machine's limit, in one row.

`terrazzo bench --help` for the commands, docs/benchmarks.md for what a row holds and how it is measured.
"""
from .providers import provider

__all__ = ["main", "provider"]


def main(argv=None):
    """The command line, for scripts that register kernels of their own; the exit code."""
    from .__main__ import main as run

    return run(argv)
