# make demo         train a small model on real text, log its forces, draw them
# make test         the test suite
# make test-all     that with coverage, the slow tests, and damaged files by the thousand
# make test-lowest  the test suite with the oldest versions that pyproject.toml allows (Python 3.11)
# make lint         style and types
# make bench        the benchmarks: each measures both sides in one run and prints the ratio
# make clean        what these made
PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin
FUZZ := tests/fuzz_files.py

.PHONY: demo test test-all test-lowest lint bench clean

demo: .venv/.user
	$(BIN)/weightdyn demo

test: .venv/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow" $(COVERAGE)

test-all: COVERAGE := --cov --cov-report=term --cov-fail-under=95
test-all: test
	$(BIN)/python -m pytest -n 2 -m slow
	$(if $(wildcard $(FUZZ)),$(BIN)/python $(FUZZ) --count 1000)

test-lowest: .venv-lowest/.test
	$(LOWEST)/python -m pytest -n 2 -m "not slow"

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/.dev
	set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf .venv .venv-lowest build dist .pytest_cache .ruff_cache .hypothesis .coverage* *.egg-info

# torch goes first and under its exact version: a looser request would fetch another build.
.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	touch $@

.venv/.user: .venv/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[hf]"
	touch $@

.venv/.dev: .venv/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@ .venv/.user

.venv-lowest/.test: constraints-lowest.txt pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/python -m pip install --quiet -c constraints-lowest.txt -e ".[test]"
	touch $@
