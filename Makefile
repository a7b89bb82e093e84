# make run       venv, install, build, then the demo: Hugging Face's Bamba as it is and patched
# make test      every test: the machine's best build, the op tests on every lesser one, sanitizers, install without a compiler
# make sanitize  the op tests under address and undefined-behaviour sanitizers only
# make cuda      the package with CUDA kernels for every GPU in build/cuda, built and tested without one (nvcc needed)
# make resources  docs/cuda_kernels.md: registers, occupancy, instructions and accesses of every CUDA kernel (nvcc needed, no GPU)
# make aot       every Triton kernel compiled for every GPU, and docs/triton_kernels.md written; no GPU needed
# make emulated  the CUDA kernels on a CPU: plain, under the race detector, under sanitizers (CUDA's headers needed, no GPU)
# make bench     the quick benchmark suite;  make targets  the speed targets
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
OP_TESTS := tests/test_ops.py tests/test_bad_input.py
CUDA_TESTS := cuda/test_extension.py triton/test_fake.py test_dispatch.py test_cli.py test_package.py test_bad_input.py
# The builds below the one this machine picks: portable and avx2 where it picks avx512.
LESSER_ISAS = $$($(BIN)/python -c "from terrazzo import native; isas = ['portable', 'avx2', 'avx512', 'avx512_bf16', 'amx']; print(*isas[:isas.index(native.isa())])")

.PHONY: run test sanitize cuda test-install resources aot emulated bench targets build clean

$(BIN)/.ready: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

# The Python files are used in place; the extension is rebuilt by ninja where sources changed.
build: $(BIN)/.ready
	TERRAZZO_WITH_CPU=1 $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/pip show -q terrazzo 2>/dev/null || TERRAZZO_WITH_CPU=0 $(BIN)/pip install -q --no-build-isolation --no-deps -e .

run: build
	$(BIN)/terrazzo demo

# Two test processes share the cores: a thread that waits for work must not keep one busy.
test: export OMP_WAIT_POLICY = PASSIVE

# The last line is pytest's own, over everything but what the other targets cover.
test: build cuda sanitize test-install
	for isa in $(LESSER_ISAS); do TERRAZZO_CPU_ISA=$$isa $(BIN)/python -m pytest -q -n 2 $(OP_TESTS) || exit 1; done
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/triton
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests

# The whole package again in build/sanitize, its kernels instrumented. Leaks are Python's own at exit: not looked for.
sanitize: $(BIN)/.ready
	TERRAZZO_WITH_CPU=1 TERRAZZO_SANITIZE=1 TERRAZZO_BUILD_ISAS=portable,avx2 $(BIN)/python setup.py -q build \
	    --build-base build/sanitize --build-lib build/sanitize/lib
	cd build/sanitize && PYTHONPATH=$(CURDIR)/build/sanitize/lib:$(CURDIR)/tests LD_PRELOAD=$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libubsan.so) \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider \
	    -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) $(addprefix $(CURDIR)/,$(OP_TESTS)) -k "not gradcheck and not thread_count and not negative"

# Its objects are shared with the build in place, and with the tests in tests/cuda that look at what nvcc made.
cuda: build
	$(BIN)/python tests/tools/nvcc.py
	cd build/cuda && PYTHONPATH=$(CURDIR)/build/cuda/lib $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider \
	    -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) $(addprefix $(CURDIR)/tests/,$(CUDA_TESTS))

# Minutes: every entry is compiled, launched and counted.
resources: build
	PYTHONPATH=tests $(BIN)/python -m tools.cuda_report

# A wheel made with no compiler at hand: the reference backend serves every op. Run without site (-S), so that the
# editable install's import hook does not lend its extension.
test-install: $(BIN)/.ready
	rm -rf build/no-compiler && mkdir -p build/no-compiler
	CXX=no-such-compiler $(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/no-compiler .
	cd build/no-compiler && $(abspath $(BIN))/python -m zipfile -e terrazzo-*.whl lib && \
	    PYTHONPATH=lib:$$($(abspath $(BIN))/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])") \
	    $(abspath $(BIN))/python -S $(CURDIR)/tests/without_extension.py

# An hour or two; what was compiled before comes from Triton's cache, so an interrupted run goes on where it was.
aot: build
	PYTHONPATH=tests $(BIN)/python -m tools.triton_aot --write docs/triton_kernels.md

emulated: build
	$(BIN)/python -m pytest -q -n 2 tests/cuda
	TERRAZZO_EMULATOR=races $(BIN)/python -m pytest -q -n 2 tests/cuda/test_emulated*.py
	LD_PRELOAD=$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libubsan.so) ASAN_OPTIONS=detect_leaks=0 TERRAZZO_EMULATOR=sanitize \
	    $(BIN)/python -m pytest -q -p no:cacheprovider tests/cuda/test_emulated*.py

bench: build
	$(BIN)/terrazzo bench --quick
targets: build
	$(BIN)/terrazzo bench targets

clean:
	rm -rf build $(VENV) pyops/*.so *.egg-info
