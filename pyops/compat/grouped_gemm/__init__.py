"""grouped_gemm's interface on terrazzo's ops. Source of the signatures: tgale96/grouped_gemm 0.3, fanshiqing's fork."""
from . import backend, ops

__version__ = "0.3.0"
__all__ = ["backend", "ops"]
