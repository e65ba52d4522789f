# Needs python3 (3.10 to 3.13) with its venv module, and make. `make PYTHON=python3.12 test` takes another Python.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_FOR_DEMO := $(VENV)/.installed-export
INSTALLED_FOR_DOCS := $(VENV)/.installed-docs
PICTURE := docs/character.png
COMPUTING := $(addprefix tests/,batching engines evaluation generate graphs models ops parity quantize reference rewrite sampling)
GPU_OUT ?= benchmarks/results/gpu
GPU_OPTIONS ?=
MODEL_OUT ?= runs/characters64
MODEL_OPTIONS ?=

.PHONY: help install server lint test test-full test-processors test-wheel test-ray test-page test-api fuzz demo model docs gpu clean

help:
	@echo "make install    everything into $(VENV)"
	@echo "make lint       ruff and mypy"
	@echo "make server     the Triton server of the tests, into the user's cache folder"
	@echo "make test       install, server, lint, and the tests"
	@echo "make test-full  the full-size golden chains (tens of minutes)"
	@echo "make test-processors  the tests of what computes, with instruction sets of older processors"
	@echo "make test-wheel build the wheel, and try it in empty environments"
	@echo "make test-ray   install Ray, and run the tests that need it"
	@echo "make test-page  install Chromium and Playwright, and run the tests of lfdm-web's page in that browser"
	@echo "make test-api   install Schemathesis, and draw 2,000 requests to /v1/videos from its description"
	@echo "make fuzz       a minute of damaged pictures, clips, checkpoints, bundles, requests"
	@echo "make demo       export the shipped model, and let a drawn character nod"
	@echo "make model      the shipped model from nothing, into MODEL_OUT (runs/characters64): hours; the same command continues"
	@echo "make docs       the documentation, into site/; its links are checked, its notebook is run"
	@echo "make gpu        the GPU suite, on a machine with a GPU, into GPU_OUT (benchmarks/results/gpu)"
	@echo "make clean      remove what the tools and the demo wrote (not $(VENV))"

install: $(INSTALLED)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Repeated only when the project's requirements change.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# The demo needs less; where everything is installed, nothing more.
$(INSTALLED_FOR_DEMO): pyproject.toml constraints.txt | $(BIN)/python
	test $(INSTALLED) -nt pyproject.toml -a $(INSTALLED) -nt constraints.txt || \
	  $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[export]'
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# 55 MB once, through pip; nothing is fetched where it is there.
server: install
	$(BIN)/lfdm-serve --quiet --install-server

test: install server lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test-full: install
	$(BIN)/python -m pytest -q -m full

# What computes, on libraries that are kept from using some of the processor's instructions.
test-processors: install
	for limits in "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41" "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2" \
	  "ONEDNN_MAX_CPU_ISA=AVX512_CORE"; do \
	  echo "$$limits" && env $$limits $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(COMPUTING) || exit 1; \
	done

test-wheel: install
	$(BIN)/python -m pytest -q -m wheel tests/packaging

test-ray: install
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[bulk]'
	$(BIN)/python -m pytest -q tests/bulk

# Chromium comes from the distribution, which takes root.
test-page: install
	command -v chromium || command -v chromium-browser || command -v google-chrome || (apt-get update -qq && apt-get install -qq --no-install-recommends chromium) \
	  || { echo "there is no Chromium; install it as root: apt-get install chromium"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt playwright
	$(BIN)/python -m pytest -q tests/web/test_page_browser.py

test-api: install
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt schemathesis
	$(BIN)/python -m pytest -q -s tests/web/test_api_generated.py

fuzz: install
	$(BIN)/python benchmarks/fuzz.py --minutes 1

demo: $(INSTALLED_FOR_DEMO)
	rm -rf demo
	mkdir demo
	$(BIN)/lfdm-export --engine fp32 --out demo/bundle
	$(BIN)/lfdm-generate demo/bundle --image $(PICTURE) --label nod --steps 50 --seed 1 --panels --out demo/clip.gif
	@echo
	@echo "clip           $(CURDIR)/demo/clip.gif"
	@echo "bundle         $(CURDIR)/demo/bundle"
	@echo "parity report  $(CURDIR)/demo/bundle/parity/report.html"

model: install
	$(BIN)/lfdm-train recipe characters64 --out $(MODEL_OUT) $(MODEL_OPTIONS)

$(INSTALLED_FOR_DOCS): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	@touch $@

# The variable: MkDocs 1 is what is pinned, nothing needs to be said of other versions.
docs: $(INSTALLED_FOR_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "documentation  $(CURDIR)/site/index.html"

# No install: PYTHON's own torch, built for CUDA, is what it needs.
gpu:
	PYTHON=$(PYTHON) benchmarks/gpu_run.sh measure $(GPU_OUT) $(GPU_OPTIONS)

clean:
	rm -rf build dist demo site *.egg-info models/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find lfdm_export models tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
