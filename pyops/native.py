"""Loads the compiled extension, if it was built, and says why not otherwise; what its CUDA kernels were built for."""
import importlib
import re
from contextlib import contextmanager

import torch

try:
    _C = importlib.import_module("terrazzo._C")
    why_not = None
except ImportError as error:
    _C = None
    why_not = f"the compiled extension terrazzo._C is not available ({error}); reinstall with a C++ compiler"

available = _C is not None
_cuda = (_C.cuda() if available else None) or {"archs": "", "ops": "", "toolkit": 0, "driver": 0}
CUDA_ARCHS = tuple(_cuda["archs"].split())  # ("sm_80", …, "compute_100"): machine code, and PTX; () without CUDA kernels
CUDA_OPS = frozenset(_cuda["ops"].split())  # of torch.ops.terrazzo


def isa():
    """The CPU build in use: "portable", "avx2", "avx512", "avx512_bf16" or "amx"; None without the extension."""
    return _C.isa() if available else None


def cpu_vendor():
    """What /proc/cpuinfo calls this CPU's maker ("GenuineIntel", "AuthenticAMD", …); None where there is no such file."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("vendor_id")), None)
    except OSError:
        return None


def second_level_cache():
    """Bytes of a core's second-level cache, by which the CPU kernels cut products; 0 where unknown."""
    return _C.second_level_cache() if available else 0


@contextmanager
def assumed_second_level_cache(bytes):
    """Inside, the kernels take `bytes` for the size of a core's second-level cache: for tests of what other machines run."""
    _C.assume_second_level_cache(bytes)
    try:
        yield
    finally:
        _C.assume_second_level_cache(-1)


def kernel_counts():
    return _C.kernel_counts() if available else {}


def cuda_kernel_counts():
    return _C.cuda_kernel_counts() if available else {}


def reset_kernel_counts():
    if available:
        _C.reset_kernel_counts()


def poison_new_tensors(poison):
    """Whether native outputs are filled with NaN before a kernel writes them: for tests."""
    if available:
        _C.poison_new_tensors(poison)


def cuda_why_not(op, names, *tensors):
    """None when the CUDA kernels `names` behind a public function can run on these tensors' device (None entries are skipped), else the reason."""
    if not available:
        return why_not
    if not CUDA_ARCHS:
        return "this build of terrazzo has no CUDA kernels; build it from source where CUDA's compiler is, with TERRAZZO_WITH_CUDA=1"
    if not CUDA_OPS.issuperset(names):
        return f"{op} has no CUDA kernels yet"
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cuda":
            return f"the tensors are on {tensor.device}; the CUDA kernels need a GPU"
    first = next(tensor for tensor in tensors if tensor is not None)
    return device_why_not(first.device.index or 0)


_device_reasons = {}


def device_why_not(index):
    """None when the CUDA kernels run on this GPU, or it isn't here (fake tensors); else the reason."""
    if index not in _device_reasons:
        _device_reasons[index] = _device_why_not(index)
    return _device_reasons[index]


device_why_not._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import the compiler now


def _device_why_not(index):
    if torch.version.hip:
        return "torch is a ROCm build; the CUDA kernels need an NVIDIA GPU"
    if not torch.cuda.is_available():
        return None
    if why := driver_why_not(_cuda["toolkit"], _cuda["driver"]):
        return why
    capability = torch.cuda.get_device_capability(index)
    return None if runs_on(CUDA_ARCHS, *capability) else _C.missing_capability(*capability)


def driver_why_not(toolkit, driver):
    """CUDA's rule: a driver runs what was built with the same major version or an older one."""
    if driver // 1000 >= toolkit // 1000:
        return None
    return f"terrazzo was built with CUDA {version(toolkit)}, this driver runs CUDA {version(driver)}; update it, or build with an older toolkit"


def runs_on(archs, major, minor):
    """Whether a GPU of this compute capability runs code of any of these.

    Machine code runs on capabilities of the same major version that aren't older, with an "a" on that one alone, with an "f" from it
    on in its family; PTX on all that aren't older.
    """
    for arch in archs:
        kind, number, feature = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", arch).groups()
        of = divmod(int(number), 10)
        if (major, minor) == of or (major, minor) > of and feature != "a" and (kind == "compute" or major == of[0]):
            return True
    return False


def version(number):
    """CUDA's version numbers as people write them: 12080 is 12.8."""
    return f"{number // 1000}.{number % 1000 // 10}"


def cuda_facts():
    """What `terrazzo info` says of the CUDA kernels."""
    if not CUDA_ARCHS:
        return None
    return {
        "built for": list(CUDA_ARCHS),
        "toolkit": version(_cuda["toolkit"]),
        "driver": version(_cuda["driver"]) if _cuda["driver"] else None,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)],
        "ops": sorted(CUDA_OPS),
    }


def _gpu(index):
    """A GPU that is here, and why the CUDA kernels can't run on it, if so."""
    major, minor = torch.cuda.get_device_capability(index)
    return {"name": torch.cuda.get_device_name(index), "capability": f"sm_{major}{minor}", "why not": _device_why_not(index)}
