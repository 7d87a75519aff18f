# The README's commands. Everything runs in .venv, which is made on first use and again when its two files change.

PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: demo test test-full soak lint types clean env interop

demo: env
	@$(PY) -m ldm.tools.demo

test: env
	$(PY) -m pytest -q -m "not slow and not gpu"

test-full: env
	$(PY) -m pytest -q -m slow -k "not soak"

soak: env
	$(PY) -m pytest -q -m slow -k soak

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: env
	$(PY) -m mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

env: $(READY)

# diffusers and transformers beside the rest: the tests then compare with them too
interop: env
	@$(PY) -c "import diffusers, transformers, peft" 2>/dev/null || .venv/bin/pip install -q -e ".[dev,interop]" -c constraints.txt

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "needs Python 3.11 to 3.13; choose one with: make PYTHON=python3.12"; exit 1; }
	@echo "Installing into .venv: about 6 GB (torch with its GPU libraries), 1-3 minutes"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -e ".[dev]" -c constraints.txt
	@rm -f .venv/.ready-* && touch $@
