"""mamba_ssm.ops.triton.ssd_combined."""
from terrazzo.chunk_scan import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

__all__ = ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"]
