# Every target runs in one environment, .venv, which the first target that needs it creates: a machine
# needs python3 (with venv), g++ and make; the rest is installed by pip at the versions pinned in
# requirements-dev.txt.

PYTHON        ?= python3
TORCH_INDEX   ?= https://download.pytorch.org/whl/cpu
DEMO_FLAGS    ?=
DISTIL        ?= 0
LM_FLAGS      ?= --out docs/language/smollm2.json --page docs/language.md --distil $(DISTIL)
EMBED_FLAGS   ?= --out docs/language/minilm.json --page docs/language.md
BENCH_ISA     ?= native
BASELINE      ?=
GPU_PYTHON    ?= python3
GPU_FLAGS     ?=
STUDY_FLAGS   ?=
VERSION_FLAGS ?=
STATIC_FLAGS  ?=
# As TORCH_CUDA_ARCH_LIST; empty: all.
CUDA_ARCHS    ?=
# What the gate runs; the nightly run takes all.
ISAS          ?= avx2 avx512
SKIP_ISA      ?= slow or (one_order and slow_emulated)
ORDERS        ?= random
SKIP_EMULATED ?= slow or slow_emulated

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN      := .venv/bin
TORCH    := $(shell sed -n 's/^torch==//p' requirements-dev.txt)+cpu
READY    := .venv/.ready
BUILT    := .venv/.built
LANGUAGE := .venv/.language
CPP_DIR  := build/cpp
TSAN_DIR := build/tsan
EMU_DIR  := build/emulated
# LeakSanitizer needs ptrace, which containers often deny; the kernels allocate through std::vector only.
CPP_ENV  := ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

SOURCES   := $(shell find csrc -name '*.cpp' -o -name '*.h')
CUDA      := $(shell find csrc/cuda -name '*.cu' -o -name '*.cuh')
CPP_FILES := $(SOURCES) $(CUDA) $(shell find tests -name '*.cpp' -o -name '*.h' 2>/dev/null)
CMAKE      = $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja

.PHONY: help setup build test test-quick test-isa test-slow nightly test-versions test-emulated cpp-test \
        race-test cuda lint docs figures gpu-check format demo demo-lm demo-embed bench bench-gains bench-quick \
        study study-quick wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv with the pinned tools and the CPU build of torch

build: $(BUILT)  ## compile the extension into the source tree (editable install)

test: test-quick test-isa  ## the quick test suite, then the op tests under the other instruction sets

# There is a process for each core: with more threads than one they wait for each other.
test-quick: $(BUILT)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

# The default instruction set is left out, as test-quick covers it.
test-isa: $(BUILT)  ## the op tests with each further instruction set of this machine in ISAS
	isas=$$($(BIN)/python -c 'import smartbird; info = smartbird.build_info()
	print(*sorted(set(info["cpu_isas"]) & set("$(ISAS)".split()) - {info["cpu_isa"]}))')
	for isa in $$isas; do
	    echo "SMARTBIRD_CPU_ISA=$$isa"
	    SMARTBIRD_CPU_ISA=$$isa OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto -m "ops and not ($(SKIP_ISA))" \
	        tests/ops
	done

test-slow: $(BUILT)  ## the tests marked slow
	$(BIN)/pytest -m slow

# What takes too long for every change.
nightly: test-slow test-versions race-test cuda  ## the slow tests, other versions, races, all op tests, a short demo
	$(MAKE) demo DEMO_FLAGS='--quick --out build/nightly-demo'
	$(MAKE) test-emulated ORDERS="forward reverse random" SKIP_EMULATED=slow
	$(MAKE) cpp-test test-isa ISAS="scalar avx2 avx512" SKIP_ISA=slow

# VERSION_FLAGS=--large lets it download builds of some GB where there is no other.
test-versions: wheel  ## one wheel with the oldest and newest torch, Python and transformers that this machine can have
	$(BIN)/python -m tools.test_versions dist/*.whl --index $(TORCH_INDEX) $(VERSION_FLAGS)

# Configured anew, as ISAS may have changed.
cpp-test: $(CPP_DIR)/compile_commands.json  ## the torch-free kernels and their C++ tests under ASan and UBSan
	$(CMAKE) -B $(CPP_DIR) -DSMARTBIRD_SANITIZED_ISAS="$(subst $() $(),;,$(ISAS))"
	$(BIN)/cmake --build $(CPP_DIR)
	$(CPP_ENV) $(BIN)/ctest --test-dir $(CPP_DIR) --output-on-failure -j $$(nproc)

# Right in every order of the threads needs no luck on a GPU. pyproject.toml says what the markers
# mean, by which this and other targets choose their tests.
test-emulated: $(BUILT)  ## the op tests through the CUDA kernels, run on the CPU by the emulation
	$(CMAKE) -B $(EMU_DIR) -DCMAKE_BUILD_TYPE=Release \
	    -DSMARTBIRD_TORCH=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')
	$(BIN)/cmake --build $(EMU_DIR) --target smartbird_emulated test_cuda_emulation
	$(BIN)/ctest --test-dir $(EMU_DIR) --output-on-failure -R '^cuda_emulation' -j $$(nproc)
	export PYTHONPATH=tests/emulation OMP_NUM_THREADS=1
	export SMARTBIRD_EMULATED_LIBRARY=$(EMU_DIR)/libsmartbird_emulated.so
	for order in $(ORDERS); do
	    test $$order = $(firstword $(ORDERS)) && skipped="$(SKIP_EMULATED)" || skipped="$(SKIP_EMULATED) or one_order"
	    SMARTBIRD_EMULATION_ORDER=$$order $(BIN)/pytest -p emulated_cuda -q -n auto \
	        -m "(ops or emulation) and not ($$skipped)" tests/ops tests/emulation
	done

race-test: $(READY)  ## the CUDA kernels in the emulation under ThreadSanitizer
	$(CMAKE) -B $(TSAN_DIR) -DSMARTBIRD_SANITIZE=thread
	$(BIN)/cmake --build $(TSAN_DIR) --target test_cuda_emulation test_cuda_kernels
	$(BIN)/ctest --test-dir $(TSAN_DIR) --output-on-failure -R '^cuda_'

cuda: $(BUILT)  ## compile the CUDA kernels for every architecture and read their machine code: needs nvcc, no GPU
	SMARTBIRD_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHS)" \
	    $(BIN)/python setup.py -q build_ext --build-lib build/cuda
	$(BIN)/python -m tools.cuda_static build/cuda/smartbird/_C_cuda.abi3.so $(STATIC_FLAGS)

# In the environment of GPU_PYTHON, whose torch must be a CUDA build; nothing is compiled: see docs/cuda.md.
gpu-check:  ## tests, sanitizers and times on a GPU, within minutes, of libraries that are built: build/gpu
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU_FLAGS)

lint: $(CPP_DIR)/compile_commands.json  ## ruff, mypy --strict, clang-format, clang-tidy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	sed -n 's/^ *"file": "\(.*\.cpp\)",\?$$/\1/p' $< | \
	    xargs -P $$(nproc) -n 1 $(BIN)/clang-tidy -quiet -p $(CPP_DIR)

format: $(READY)  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_FILES)

# Warnings are errors: a link that leads nowhere, a docstring that cannot be read.
docs: $(BUILT)  ## the documentation as a site with a search: build/docs/index.html
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -d build/doctrees . build/docs
	cp build/docs/README.html build/docs/index.html

figures: $(BUILT)  ## tables of README.md and docs/settings.md, docs/pictures, from the JSON files in docs
	$(BIN)/python -m benchmarks.overview

demo: $(BUILT)  ## train Smart Bird beside dense attention on real text; report in build/demo
	$(BIN)/python -m benchmarks.learning.demo $(DEMO_FLAGS)

# LM_FLAGS=--quick takes three minutes and writes to build/language only; DISTIL is in minutes.
demo-lm: $(BUILT) $(LANGUAGE)  ## a real model reads 8192 tokens and writes on, dense and sampled; page docs/language.md
	$(BIN)/python -m benchmarks.language $(LM_FLAGS)

demo-embed: $(BUILT) $(LANGUAGE)  ## a real encoder embeds passages, dense and sampled; part of docs/language.md
	$(BIN)/python -m benchmarks.language.embeddings $(EMBED_FLAGS)

bench-quick: $(BUILT)  ## time attention against its rivals in under a minute: one line per ratio
	$(BIN)/python -m benchmarks.speed.attention --preset quick

bench-gains: $(BUILT)  ## time this smartbird beside an older checkout: make bench-gains BASELINE=DIR
	test -n "$(BASELINE)" || { echo 'error: BASELINE=DIR, a checkout with its extension built' >&2; exit 1; }
	$(BIN)/python -m benchmarks.speed.attention --baseline "$(BASELINE)" --isa $(BENCH_ISA) \
	    --out docs/performance/gains-$(BENCH_ISA).json
	$(BIN)/python -m benchmarks.speed.report docs/performance/gains-$(BENCH_ISA).json \
	    --update docs/performance.md

# BENCH_ISA=avx2 holds a machine that has more to AVX2.
bench: $(BUILT)  ## the whole benchmark: JSON and plots in docs/performance, tables in the documents
	$(BIN)/python -m benchmarks.speed.attention --preset standard --isa $(BENCH_ISA) \
	    --out docs/performance/attention-$(BENCH_ISA).json
	$(BIN)/python -m benchmarks.speed.report docs/performance/attention-$(BENCH_ISA).json \
	    --update docs/performance.md
	$(MAKE) figures

study-quick: $(BUILT)  ## train every attention on a small recall task, a quarter of an hour; tables in runs/study
	$(BIN)/python -m benchmarks.learning study studies/quick.toml $(STUDY_FLAGS)

# Stopped, it goes on where it was.
study: $(BUILT)  ## the whole study, two and a half hours: plots in docs/learning, tables in docs/learning.md
	for study in mqar options sketches continuation long sotu listops; do
	    $(BIN)/python -m benchmarks.learning study studies/$$study.toml --page docs/learning.md $(STUDY_FLAGS)
	done

# The wheel, unpacked elsewhere, must import without the source tree.
wheel: $(READY)  ## build a wheel in dist and try it
	rm -rf dist build/wheel
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .
	$(BIN)/abi3audit --strict dist/*.whl
	$(BIN)/auditwheel show dist/*.whl
	$(BIN)/pip install -q --no-deps --target build/wheel dist/*.whl
	cd build/wheel && PYTHONPATH=. $(CURDIR)/$(BIN)/python -c \
	    'import smartbird; assert "build/wheel" in smartbird.__file__; print(smartbird.build_info())'

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info $(BUILT)
	rm -f smartbird/*.so

# First pip's own sources, because a mirror may hold the +cpu wheel; then PyTorch's index, which the
# public PyPI does not replace: there the same version is the CUDA build, several GB.
$(READY): requirements-dev.txt
	@echo 'setting up .venv: torch $(TORCH) and requirements-dev.txt'
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'error: $(PYTHON) must be Python 3.11 or newer' >&2; exit 1; }
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	    { echo 'error: $(PYTHON) has no venv module: apt-get install python3-venv' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	install="$(BIN)/pip install -q --no-compile"  # byte code of all would take as long again
	$$install --no-deps torch==$(TORCH) 2>/dev/null || \
	    $$install --no-deps --index-url $(TORCH_INDEX) torch==$(TORCH)
	$$install -r requirements-dev.txt
	touch $@

$(LANGUAGE): $(READY) requirements-language.txt
	$(BIN)/pip install -q --no-compile --no-deps -r requirements-language.txt
	touch $@

$(BUILT): $(READY) setup.py pyproject.toml $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

$(CPP_DIR)/compile_commands.json: $(READY) CMakeLists.txt
	$(CMAKE) -B $(CPP_DIR) -DSMARTBIRD_SANITIZE=address,undefined
	touch $@
