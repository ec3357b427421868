# make demo | test | lint | soak | bench: each sets up .venv first; nothing else is needed but Python 3.10+, gcc and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# An unpinned torch pulls gigabytes of CUDA libraries; where there is no GPU the CPU build is enough.
TORCH  ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)
# Workers that spin after each parallel region starve the other process on a small machine (docs: tuning).
export OMP_WAIT_POLICY ?= passive

PYTHON_CODE := src tests benchmarks tools docs gramine deploy
SCRIPTS     := .ci/run benchmarks/gpu.sh $(wildcard deploy/steps/*.sh)
C_CODE      := $(wildcard csrc/*.c csrc/*.h tests/c/*.c tests/c/*.h tests/enclave/*.c tests/enclave/*.h tests/fuzz/*.c tests/fuzz/*.h)

.PHONY: demo test test-c test-model test-fuzz lint format docs soak bench wheel deploy-check clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -U pip

$(VENV)/.deps: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install -q --disable-pip-version-check scikit-build-core cython cmake ninja
	touch $@

$(VENV)/.installed: $(VENV)/.deps pyproject.toml CMakeLists.txt $(wildcard csrc/* src/tsqp/*.pyx src/tsqp/*.pxd src/tsqp/*.pxi)
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation \
	  --config-settings=cmake.define.TSQP_WERROR=ON -e '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/tsqp demo

test: $(VENV)/.installed test-c test-model test-fuzz
	$(BIN)/python tests/run.py

# The C core alone: units under ASan+UBSan, the two-thread ring stress under TSan.
test-c: $(VENV)/.deps
	$(BIN)/python tests/c/run.py

# The ring's protocol in every state of small rings. Needs spin (apt-get install spin), else says SKIPPED.
test-model: $(VENV)/.deps
	$(BIN)/python tests/model/run.py

# The stored fuzz inputs and random changes of them.
test-fuzz: $(VENV)/.deps
	$(BIN)/python tests/fuzz/run.py

# The long proofs: half an hour and more. Fuzzing needs clang, the model spin; what is missing is said as SKIPPED.
soak: $(VENV)/.installed
	$(BIN)/python tests/c/run.py --soak
	$(BIN)/python tests/model/run.py --soak
	$(BIN)/python tests/fuzz/run.py --minutes 2
	TSQP_SOAK=1 $(BIN)/python -m pytest -q -s tests/test_hostile_segment.py
	TSQP_SOAK=5 $(BIN)/python -m pytest -q -s tests/test_kill_campaign.py
	TSQP_SOAK=1 $(BIN)/python -m pytest -q -s tests/test_torn_reads.py
	TSQP_SOAK=1 $(BIN)/python -m pytest -q tests/test_gramine_view.py

lint: $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check -e '.[lint]' --no-build-isolation \
	  --config-settings=cmake.define.TSQP_WERROR=ON
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/clang-format --dry-run --Werror $(C_CODE)
	$(BIN)/hadolint $(wildcard deploy/*.Dockerfile)
	$(BIN)/check-jsonschema -q --builtin-schema vendor.compose-spec $(wildcard deploy/compose*.yaml)
	$(BIN)/shellcheck $(SCRIPTS)
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest tsqp._ring tsqp._message tsqp._channel tsqp._kernels tsqp._perf

format:
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)
	$(BIN)/clang-format -i $(C_CODE)

# The documentation site, into build/docs; a warning (a broken link, an undocumented name) is an error.
docs: $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check -e '.[docs]' --no-build-isolation \
	  --config-settings=cmake.define.TSQP_WERROR=ON
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs

bench: $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check 'iceoryx2>=0.8' 'matplotlib>=3.7'
	$(BIN)/python -m benchmarks.transport

# The sdist, and the wheel built from it: what a user gets from an index.
wheel: $(VENV)/.deps
	$(BIN)/pip install -q --disable-pip-version-check build
	$(BIN)/python -m build --no-isolation --outdir dist .

# What the images do, step by step and without Docker: wheel, fresh environment, server, health check, runner, SIGTERM.
deploy-check: $(VENV)/.installed
	$(BIN)/python deploy/check.py --torch '$(TORCH)'

clean:
	rm -rf build dist .venv
