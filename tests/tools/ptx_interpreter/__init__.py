"""Runs compiled PTX (Triton's and nvcc's, sm_80) in numpy on host memory and reports what a GPU would silently do wrong.

    with running_ptx():
        y = terrazzo.rmsnorm_gated(x, weight, backend="triton")      # CPU tensors; the compiled kernel's own result

    launch(ptx, "kernel", grid, block, [tensor, 5, 1.0], dynamic_shared=1024)

PTXError names the kernel, block, thread, instruction and source line of: accesses out of bounds or misaligned, reads of
shared memory that was never written or that a cp.async not waited for will write, races between warps in shared memory
and between blocks in global memory, barriers and warp instructions that some threads never reach, and unknown instructions.

Read in this order: numbers.py (types), parser.py (text -> Kernel), program.py (Kernel -> Steps; registry of instructions),
machine.py (threads, divergence, barriers), memory.py (memory spaces and their checks), then the instructions: control.py,
moves.py, arithmetic.py, bits.py, memory_access.py, warps.py; launch.py is the front. traffic.py counts bank conflicts and sectors.

Beyond it: races between lanes of one warp, the order of float additions inside the tensor cores, timing, and everything
newer than sm_80 (wgmma, TMA, mbarrier, clusters).
"""
from .launch import launch, running_ptx
from .parser import PTXError
from .traffic import Traffic

__all__ = ["PTXError", "Traffic", "launch", "running_ptx"]
