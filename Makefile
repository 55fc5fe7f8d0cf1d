# Everything below works with Python 3.11 to 3.13, pip and a C compiler; no root, no GPU.
#
#   make demo            code two clips with our codec and others, write a report to demo_out/
#   make demo FRAMES=5   the same on a few frames
#   make test            the tests
#   make test-slow       those that take minutes each
#   make lint            style
#   make env             only the environment, in .venv; done by the others when needed
#   make clean           remove the environment and everything that was generated

PYTHON ?= python3
OUT ?= demo_out
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: env demo test test-slow lint clean

env: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

demo: env
	$(BIN)/python eval.py --config=configs/demo.py --workdir=$(OUT) $(if $(FRAMES),--config.frames=$(FRAMES))

PYTEST := $(BIN)/python -m pytest -q --durations 30 --durations-min 10 \
  --numprocesses auto --maxprocesses 4 --dist worksteal

test: env
	$(PYTEST) -m "not slow"

test-slow: env
	$(PYTEST) -m slow

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build demo_out nvc_jax.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
