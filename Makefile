# Every target sets up .venv by itself: nothing has to be done by hand before.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SETUP := pyproject.toml constraints.txt

.PHONY: demo test test-slow check docs bench clean

demo: .venv/.demo
	$(BIN)/apot-fx demo

test: .venv/.dev
	$(BIN)/python -m pytest -m "not slow" --durations=20 -q

test-slow: .venv/.zoo
	$(BIN)/python -m pytest -m slow --durations=20 -q

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.dev
	$(BIN)/python -m pytest -q --doctest-modules apot_fx
	$(BIN)/python -m pytest -q --doctest-glob='*.md' README.md docs
	for script in examples/*.py; do $(BIN)/python $$script > /dev/null || exit 1; done

bench: .venv/.zoo
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/.demo: $(SETUP) | .venv/bin/pip
	$(PIP) -e '.[demo]'
	touch $@

.venv/.dev: $(SETUP) | .venv/bin/pip
	$(PIP) -e '.[dev]'
	touch $@ .venv/.demo

# The models of benchmarks/zoo.py. Without their own requirements, lest torch be fetched anew.
.venv/.zoo: .venv/.dev
	$(PIP) -e '.[zoo]'
	$(PIP) --no-deps torchvision timm
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
