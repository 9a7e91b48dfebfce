# make demo   train a small model on real text, log its forces, draw them
# make test   the test suite, with coverage
# make lint   style and types
# make bench  the benchmarks: each measures both sides in one run and prints the ratio
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/.user
	$(BIN)/weightdyn demo

test: .venv/.dev
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term --cov-fail-under=90

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/.dev
	set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .coverage* *.egg-info

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
