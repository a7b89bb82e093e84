"""Triton kernels for NVIDIA and AMD GPUs: one file per op with its kernels and launchers.

`library` holds every schema, `runtime` what is known of the device, `configs` how tile sizes are chosen, `interpreter`
the corrections that Triton's interpreter needs. Nothing here imports triton before the first launch.
"""
