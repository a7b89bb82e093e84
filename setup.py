"""Builds terrazzo: the Python packages, and `terrazzo._C` with the native kernels.

Kernel files in csrc/cpu are torch-free and compiled once per instruction set by ninja, those in csrc/cuda by nvcc
for every GPU; the glue in csrc/bindings uses only torch's stable ABI and Python's limited API, so one binary serves
torch >= 2.10 and CPython >= 3.10, with a GPU and without. Without a C++ compiler the package still installs and
runs on its reference backend.

Environment:
    TERRAZZO_WITH_CPU=auto|0|1    1: fail when the extension cannot be built; 0: build none
    TERRAZZO_WITH_CUDA=auto|0|1   the CUDA kernels in it. auto: where torch is a CUDA build and a CUDA toolkit is found; 1: fail
                                  without a toolkit (torch may be a CPU build, no GPU is needed)
    TERRAZZO_CUDA_ARCHS           compute capabilities, default 80;90a;100a; PTX of the last one is added for newer GPUs
    CUDA_HOME                     the toolkit, if it isn't in /usr/local
    MAX_JOBS, CXX
    TERRAZZO_BUILD_ISAS           a subset of portable,avx2,avx512,avx512_bf16 for a faster build
    TERRAZZO_SANITIZE=1           address and undefined-behaviour sanitizers; see `make sanitize`
"""
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGES = {
    "terrazzo": "pyops",
    "terrazzo.triton_kernels": "triton_kernels",
    "terrazzo.models": "models",
    "terrazzo.bench": "bench",
}
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    # g++ 12 warns about its own avx512 header, and about 16-row transposes that three rows never take
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
               "-Wno-array-bounds"],
}
# What multiplies bfloat16 is compiled once more; every other kernel of this build is avx512's (csrc/cpu/kernels.h).
ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
BF16_SOURCES = ("grouped_gemm", "norm_linear", "fused_experts_fwd", "fused_experts_bwd")
SANITIZE = os.environ.get("TERRAZZO_SANITIZE") == "1"
SANITIZE_CHECKS = "address,signed-integer-overflow,bounds,shift,integer-divide-by-zero"
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE_CHECKS}", "-fno-sanitize-recover=all", "-g1"] if SANITIZE else []
KERNEL_FLAGS = ["-O1" if SANITIZE else "-O3", "-ffp-contract=fast", "-fno-math-errno"]
COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *SANITIZE_FLAGS]
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10
LIMITED_API = "0x030a0000"  # CPython 3.10
CUDA_FLAGS = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-fPIC,-fvisibility=hidden"]


def subpackages():
    found = dict(PACKAGES)
    for name, folder in PACKAGES.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            parts = init.parent.relative_to(ROOT / folder).parts
            if parts:
                found[".".join((name, *parts))] = str(init.parent.relative_to(ROOT))
    return found


def isas():
    wanted = os.environ.get("TERRAZZO_BUILD_ISAS", ",".join(ISA_FLAGS)).split(",")
    unknown = set(wanted) - set(ISA_FLAGS)
    if unknown or "portable" not in wanted:
        raise SystemExit(f"terrazzo: TERRAZZO_BUILD_ISAS must name portable and any of {', '.join(ISA_FLAGS)}, got {','.join(wanted)}")
    if "avx512_bf16" in wanted and "avx512" not in wanted:
        raise SystemExit("terrazzo: TERRAZZO_BUILD_ISAS: avx512_bf16 needs avx512 beside it")
    return {isa: ISA_FLAGS[isa] for isa in wanted}


def ninja_command():
    """The ninja wheel's binary, or the one on PATH; None when there is neither."""
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    return ["ninja"] if shutil.which("ninja") else None


def cuda_home(headers_alone=False):
    """The CUDA toolkit: CUDA_HOME, CUDA_PATH, around nvcc on PATH, or below /usr/local, newest first; None when there is none.
    headers_alone: what builds nothing for GPUs will do (the tests' emulator)."""
    asked = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    found = sorted(Path("/usr/local").glob("cuda-*"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], reverse=True)
    on_path = [Path(nvcc).resolve().parent.parent] if (nvcc := shutil.which("nvcc")) else []  # may be a wrapper that lies elsewhere
    for place in [Path(p) for p in asked] or [*on_path, Path("/usr/local/cuda"), *found]:
        headers = all((place / "include" / name).is_file() for name in ("cuda_runtime_api.h", "cuda_bf16.h"))
        if headers and (headers_alone or (place / "bin/nvcc").is_file() and cudart(place)):
            return place
    return None


def cudart(home):
    """CUDA's runtime, to be linked statically: the extension then imports without a driver, and beside any torch."""
    return next((lib for lib in (home / "lib64/libcudart_static.a", home / "lib/libcudart_static.a") if lib.is_file()), None)


def with_cuda():
    """The CUDA toolkit to build with, or None."""
    wanted = os.environ.get("TERRAZZO_WITH_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"terrazzo: TERRAZZO_WITH_CUDA must be auto, 0 or 1, got {wanted}")
    import torch

    if wanted == "0" or wanted == "auto" and not torch.version.cuda:
        return None
    home = cuda_home()
    if wanted == "1" and not home:
        raise SystemExit("terrazzo: CUDA kernels were asked for (TERRAZZO_WITH_CUDA=1), but there is no CUDA toolkit (nvcc, headers, libcudart_static.a) "
                         "in CUDA_HOME or /usr/local: set CUDA_HOME")
    if not home:
        print("terrazzo: building without CUDA kernels: no CUDA toolkit in CUDA_HOME or /usr/local", file=sys.stderr)
    return home


def cuda_archs():
    """["80", "90a", …], ascending."""
    text = os.environ.get("TERRAZZO_CUDA_ARCHS") or "80;90a;100a"
    if not re.fullmatch(r"\d{2,3}[af]?(;\d{2,3}[af]?)*", text):
        raise SystemExit(f"terrazzo: TERRAZZO_CUDA_ARCHS must be compute capabilities such as 80;90a;100a, got {text}")
    archs = sorted(set(text.split(";")), key=lambda arch: (int(arch.rstrip("af")), arch))
    if int(archs[0].rstrip("af")) < 80:
        raise SystemExit(f"terrazzo: the CUDA kernels need compute capability 80 or newer, TERRAZZO_CUDA_ARCHS has {archs[0]}")
    return archs


def cuda_targets():
    """{name: what nvcc is told}: machine code of every capability, and PTX of the last, without what is that GPU's own, for newer ones."""
    archs = cuda_archs()
    newest = archs[-1].rstrip("af")
    targets = {f"sm_{arch}": f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs}
    return targets | {f"compute_{newest}": f"-gencode=arch=compute_{newest},code=compute_{newest}"}


def nvcc(home):
    """The compiler and what it is told for every file."""
    said = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = int(re.search(r"release (\d+)", said)[1])
    smaller = ["--compress-mode=size"] if release >= 13 else []  # a fifth of the size; drivers of that release can unpack it
    return " ".join([str(home / "bin/nvcc"), "-ccbin", "$cxx", *CUDA_FLAGS, *smaller, *cuda_targets().values()])


def why_no_extension():
    """None when the native extension can be built here, else the reason it cannot."""
    if os.environ.get("TERRAZZO_WITH_CPU") == "0":
        return "TERRAZZO_WITH_CPU=0"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"no native kernels for {platform.machine()} yet"
    if not shutil.which(os.environ.get("CXX", "g++")):
        return f"no C++ compiler: {os.environ.get('CXX', 'g++')} is not on PATH"
    if not ninja_command():
        return "ninja is not installed: pip install ninja"
    try:
        import torch  # noqa: F401  (its headers and libraries are needed)
    except ImportError as error:
        return f"torch cannot be imported at build time: {error}"
    return None


class NinjaBuild(build_ext):
    """Writes one build.ninja for every object file, runs it, and links `terrazzo._C`."""

    def build_extension(self, ext):
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        def from_root(path):  # ninja runs in ROOT: a moved or copied checkout keeps its objects
            return Path(os.path.relpath(path, ROOT))

        build = from_root(self.build_temp)
        target = from_root(self.get_ext_fullpath(ext.name))
        for folder in (build, target.parent):
            (ROOT / folder).mkdir(parents=True, exist_ok=True)

        glue_flags = ["-O2", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DPy_LIMITED_API={LIMITED_API}"]
        glue_flags += [f"-I{sysconfig.get_paths()['include']}"] + [f"-isystem{path}" for path in include_paths()]
        glue_flags += [f"-DTZ_BUILD_{isa.upper()}" for isa in isas()]
        glue_flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
        home, glue = with_cuda(), "glue"
        if home:  # glue of its own name: builds with and without CUDA share a folder, and everything else in it
            glue = "cuda_glue"
            glue_flags += ["-DTZ_WITH_CUDA", f"-DTZ_CUDA_ARCHS='\"{' '.join(cuda_targets())}\"'", f"-isystem{home / 'include'}"]
        objects = []
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            for isa, flags in isas().items():
                if isa == "avx512_bf16" and source.stem not in BF16_SOURCES:
                    continue
                objects.append((build / f"{source.stem}.{isa}.o", from_root(source), [*KERNEL_FLAGS, *flags, f"-DTZ_ISA={isa}"]))
        for source in [*sorted((ROOT / "csrc/bindings").glob("*.cpp")), ROOT / "csrc/library.cpp"]:
            objects.append((build / f"{glue}_{source.stem}.o", from_root(source), glue_flags))
        for source in sorted((ROOT / "csrc/common").glob("*.cpp")):
            objects.append((build / f"common_{source.stem}.o", from_root(source), ["-O2"]))

        cuda_sources = sorted((ROOT / "csrc/cuda").glob("*.cu")) if home else []
        cuda_objects = [(build / f"{source.stem}.cuda.o", from_root(source)) for source in cuda_sources]

        def quoted(path):
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        lines = [
            f"cxx = {os.environ.get('CXX', 'g++')}",
            f"common = {' '.join(COMMON_FLAGS)}",
            "rule compile",
            "  description = $what",
            "  command = $cxx $common $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  description = $what",
            "  command = $cxx -shared $in -o $out $flags",
        ]
        for out, source, flags in objects:
            lines += [f"build {quoted(out)}: compile {quoted(source)}", f"  flags = {' '.join(flags)}", f"  what = {out.name}"]
        if home:
            lines += ["rule compile_cuda", "  description = $what", f"  command = {nvcc(home)} -MD -MF $out.d -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
        for out, source in cuda_objects:
            lines += [f"build {quoted(out)}: compile_cuda {quoted(source)}", f"  what = {out.name}"]
        # libtorch is what brings libtorch_cuda into sight, where there is one: kept although nothing here names a symbol of it
        link_flags = [f"-L{path}" for path in library_paths()] + ["-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch", "-Wl,--exclude-libs,ALL", *SANITIZE_FLAGS]
        if home:
            link_flags += [str(cudart(home)), "-ldl", "-lrt", "-lpthread"]
        linked = [out for out, *_ in [*objects, *cuda_objects]]
        lines += [f"build {quoted(target)}: link {' '.join(map(quoted, linked))}", f"  flags = {' '.join(link_flags)}", f"  what = {target.name}", ""]
        recipe = build / "build.ninja"
        (ROOT / recipe).write_text("\n".join(["ninja_required_version = 1.5", f"builddir = {quoted(build)}", *lines]))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([*ninja_command(), "-f", str(recipe), *jobs], check=True, cwd=ROOT)


if __name__ == "__main__":  # the tests import what is above
    reason = why_no_extension()
    if reason and os.environ.get("TERRAZZO_WITH_CPU") == "1":
        raise SystemExit(f"terrazzo: the native extension was asked for (TERRAZZO_WITH_CPU=1) but cannot be built: {reason}")
    if reason:
        print(f"terrazzo: installing without native kernels ({reason}); the reference backend will serve every op", file=sys.stderr)
    packages = subpackages()
    setup(
        packages=list(packages),
        package_dir=packages,
        package_data={"terrazzo": ["*.txt", "*.json", "*.typed", "templates/*.html"], "terrazzo.models": ["entropy/*", "tiny_bamba/*", "tiny_blt/*"]},
        ext_modules=[] if reason else [Extension("terrazzo._C", sources=[], py_limited_api=True)],
        cmdclass={} if reason else {"build_ext": NinjaBuild},
        options={} if reason else {"bdist_wheel": {"py_limited_api": "cp310"}},
    )
