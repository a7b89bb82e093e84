"""What nvcc makes of every CUDA kernel, run: its PTX for sm_80 in the PTX interpreter, against the float64 reference.

The emulator runs the same sources, but g++'s compilation of them, and replaces their inline PTX. Here the compiled kernels run, with
the instructions written by hand, and races, uninitialised shared memory and accesses out of bounds or misaligned are found in them.
"""
import re

import pytest
import terrazzo
import torch
from terrazzo import cases

from test_ops import DTYPES, assert_matches
from tools import nvcc
from tools.emulated_cases import CASES
from tools.emulated_ptx import entries_of, noting, running_ptx
from tools.ptx_interpreter import PTXError

BY_NAME = {str(case): case for case in CASES}
