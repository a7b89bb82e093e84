"""The benchmark suite: how much faster, how exact, how far from this machine's limit, in one row.

`terrazzo bench --help` for the commands, docs/benchmarks.md for what a row holds and how it is measured.
"""
