# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# A plain `torch` takes the CUDA build on Linux; any build of 2.11 or later will do.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

# The images of the bundled models; `hflow_rt/assets/fluent.py` makes them from a public package.
FLUENT ?= fluent64.zip
PY ?= $(BIN)/python
HFLOW = $(PY) -m hflow_rt.cli

# A GPU machine brings its own torch and triton and may have no network: make gpu-test PY=python3, and the other gpu-
# targets likewise, with WHEELS="a.whl b.whl" for what else it lacks. The project is then installed into build/gpu.
WHEELS ?=
# seconds for gpu-report; PART=kernels, proof, decode, training or latency for a part of it, OPS=blur for some of the
# operators, LATENCY='--presets hflow-128 --precision mixed' for some of benchmarks/latency.py
BUDGET ?= 3600
PART ?=
OPS ?=
LATENCY ?=
# the folders of a checkout are not the package, so the current folder must not be looked in
ON_GPU = env PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/gpu:$(CURDIR)/benchmarks:$(PYTHONPATH)

.PHONY: install proofs web serving demo test lint types check bench kernels pretrained bundle gpu-install gpu-test gpu-report gpu-train pictures clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[cpu,train,eval,video,explore,serve,shards,dev]"
	touch $@

demo: install
	$(BIN)/hflow-rt demo

# What proves kernels and engines without a GPU: triton and TensorRT for RTX, 1.3 GB that nothing else here needs.
proofs: $(VENV)/.proofs

$(VENV)/.proofs: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[kernels,rtx]"
	touch $@

# What runs a model in a browser, from npm, for `hflow-rt explore --static`; a wheel that is built later holds it, too.
ORT_WEB ?= onnxruntime-web@1.30.0
WEB := runtime/explore/web-runtime
web: $(WEB)/ort-wasm-simd-threaded.wasm

$(WEB)/ort-wasm-simd-threaded.wasm:
	mkdir -p build/web $(WEB)
	cd build/web && tar xzf "$$(npm pack --silent $(ORT_WEB))"
	cd build/web/package/dist && cp ort.wasm.min.mjs ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm $(abspath $(WEB))
	rm -r build/web

# The real inference server, half a GB, for the tests of serving; it wants an older numpy, hence a virtualenv of its own.
TRITON_VENV ?= .venv-triton
serving: $(TRITON_VENV)/.installed

$(TRITON_VENV)/.installed:
	$(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/pip install --quiet nvidia-pytriton onnxruntime pydantic safetensors platformdirs psutil pillow typer rich
	$(TRITON_VENV)/bin/pip install --quiet --no-deps .
	rm -rf build
	touch $@

# One worker a core, each with one thread; a file stays on one worker, and those with slow tests come first.
test: proofs $(if $(shell command -v npm),web)
	OMP_NUM_THREADS=1 $(BIN)/pytest -p no:benchmark -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not see through the mapped folders of an editable install, so it reads an ordinary one
types: install
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --target build/types .
	cd build/types && MYPYPATH=. $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) --python-executable $(abspath $(BIN))/python

check: lint types test

bench: install
	$(BIN)/pytest benchmarks --report cpu

# What the Triton kernels compile to, for every GPU generation; needs no GPU.
kernels: proofs
	$(BIN)/python -m hflow_rt.kernels.report

# A bundled model, made again on a CPU core: make pretrained MODEL=ihdm-emoji. hflow-emoji takes an hour for all
# of it and half of one for its coarse flows; others take the hours that their cards say.
MODEL ?= hflow-emoji
FROM ?= runs/$(MODEL)
EXPORT_hflow-emoji = --bound --std 1 --std z2=0.8 --std z1=0.5 --std z0=0.4
EXPORT_nvae-emoji = --std 1
pretrained: install $(FLUENT)
ifeq ($(MODEL),hflow-emoji)
	$(HFLOW) train --preset hflow-emoji --data $(FLUENT) --out runs/hflow-emoji-joint
	$(HFLOW) train --preset hflow-emoji-coarse --from runs/hflow-emoji-joint --data $(FLUENT) --out runs/hflow-emoji
else
	$(HFLOW) train --preset $(MODEL) --data $(FLUENT) --out runs/$(MODEL)
endif
	$(MAKE) bundle

# The second half alone, of a run or a model file: make bundle MODEL=ihdm-emoji FROM=runs/my-run
bundle: install
	rm -rf build/$(MODEL)
	$(HFLOW) export $(FROM) --half $(EXPORT_$(MODEL)) --out build/$(MODEL)
	rm -rf hflow_rt/assets/$(MODEL)
	mv build/$(MODEL) hflow_rt/assets/$(MODEL)

$(FLUENT):
	npm pack @lobehub/fluent-emoji-3d@1.1.0
	$(PY) -m hflow_rt.assets.fluent lobehub-fluent-emoji-3d-1.1.0.tgz $@

gpu-install:
	rm -rf build
	$(PY) -m pip install --quiet --no-index --no-deps --no-build-isolation --target build/gpu . $(WHEELS)

# Every kernel on the chip itself: forward, inverse, backward against float64, models, CUDA graphs; then the engines.
# Whatever warnings other versions of torch and triton give are not what is tested here.
gpu-test: gpu-install
	$(ON_GPU) $(PY) -m pytest tests/kernels tests/export tests/runtime -m gpu -rs -W default

# Bandwidth of every kernel, latency of decoding, a training step, into benchmarks/results.
gpu-report: gpu-install
ifneq ($(PART),latency)
	$(ON_GPU) $(PY) benchmarks/kernels.py $(PART:%=--part %) --ops '$(OPS)' --budget $(BUDGET)
endif
ifneq ($(filter latency,$(or $(PART),latency)),)
	$(ON_GPU) $(PY) benchmarks/latency.py --device cuda --budget $(BUDGET) $(LATENCY)
endif

# Ten minutes of a larger model on a GPU, from the last checkpoint if there is one.
gpu-train: gpu-install $(FLUENT)
	if [ -d runs/gpu/checkpoints ]; then $(ON_GPU) $(HFLOW) train --resume runs/gpu --device cuda --minutes 10; \
	else $(ON_GPU) $(HFLOW) train --preset hflow-64 --data $(FLUENT) --out runs/gpu --device cuda --minutes 10; fi

# Every picture in the docs, drawn by hflow-emoji.
pictures: install
	PATH="$(abspath $(BIN)):$$PATH" docs/make_pictures.sh

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache
