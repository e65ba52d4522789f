# Needs python3 (3.10 to 3.13) with its venv module, and make. `make PYTHON=python3.12 test` takes another Python.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PHOTO := tests/data/astronaut.jpg

.PHONY: help install lint test test-full demo clean

help:
	@echo "make install    everything into $(VENV)"
	@echo "make lint       ruff and mypy"
	@echo "make test       install, lint, and the tests"
	@echo "make test-full  the full-size golden chains (tens of minutes)"
	@echo "make demo       export a small model, and generate a clip from a photograph"
	@echo "make clean      remove what the tools and the demo wrote (not $(VENV))"

install: $(INSTALLED)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Repeated only when the project's requirements change.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install lint
	$(BIN)/python -m pytest -q

test-full: install
	$(BIN)/python -m pytest -q -m full

demo: install
	rm -rf demo
	mkdir demo
	$(BIN)/lfdm-export --engine fp32 --out demo/bundle
	$(BIN)/lfdm-generate demo/bundle --image $(PHOTO) --label happiness --seed 0 --panels --out demo/clip.gif
	@echo
	@echo "clip           $(CURDIR)/demo/clip.gif"
	@echo "bundle         $(CURDIR)/demo/bundle"
	@echo "parity report  $(CURDIR)/demo/bundle/parity/report.html"

clean:
	rm -rf build dist demo *.egg-info models/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find lfdm_export models tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
