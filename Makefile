# Two commands do everything on a fresh machine: `make demo` and `make test`. Nothing is downloaded but packages.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
OFFLINE = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
DEMO ?= demo-run

.PHONY: demo install test test-full lint types imports docs check bench reproduce clean

demo: $(INSTALLED)  ## the main job on the embedded model: audit, plans, quantized checkpoint, report.html
	$(OFFLINE) $(BIN)/whatmatters demo --output $(DEMO) --overwrite

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

test: $(INSTALLED)  ## everything that a change must keep, in minutes
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not full" tests
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --doctest-modules src/whatmatters

test-full: $(INSTALLED)  ## the long checks too: all kills, all fuzz inputs
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

check: lint types imports docs  ## all that is not a test

bench: $(INSTALLED)  ## speed against llm-compressor, in an environment of its own
	$(BIN)/python benchmarks/gptq.py
	$(BIN)/python benchmarks/memory.py

reproduce: $(INSTALLED)  ## every experiment, results to evidence/
	$(OFFLINE) $(BIN)/whatmatters reproduce all

clean:
	rm -rf $(VENV) $(DEMO) site
