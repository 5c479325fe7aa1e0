# Everything a newcomer needs: `make demo`, `make test`. Each sets itself up; again it takes seconds.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PARTS ?= dev
TORCH ?= torch==2.13.0
# A torch of your own that sees a GPU is used as it is; otherwise one is installed into the environment.
OWN_TORCH := $(shell $(PYTHON) -c "import torch; print('yes' if torch.cuda.is_available() else '')" 2>/dev/null)

.PHONY: demo test test-slow check dev bench wheel clean

demo: $(VENV)/.installed
	$(BIN)/r2scp-pipe demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadgroup

# The long proofs alone; they share a machine with nothing else, and what fails is tried once more.
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m slow || \
	  $(BIN)/python -m pytest -q -m slow --last-failed --last-failed-no-failures none

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Peers bring hundreds of megabytes and versions of their own: they get an environment of their own.
bench:
	$(MAKE) VENV=.venv-bench PARTS="dev bench" .venv-bench/.installed
	.venv-bench/bin/python -m benchmarks

# Type checkers do not follow the import hook of an editable install: lay the package out in links.
dev: $(VENV)/.installed
	mkdir -p .types/r2scp
	for floor in store model pipelines jobs; do ln -sfn ../../$$floor .types/r2scp/$$floor; done

wheel: $(VENV)/.installed
	$(BIN)/pip wheel -q --no-deps -w dist .

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "r2scp-pipe needs Python 3.11 or newer; $(PYTHON) is older. Use: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(if $(OWN_TORCH),--system-site-packages) $(VENV)
	$(BIN)/python -m pip install -q "pip>=25.1"
	$(if $(OWN_TORCH),,$(BIN)/pip install -q "$(TORCH)")
	$(BIN)/pip install -q -e . $(addprefix --group ,$(PARTS))
	@touch $@

clean:
	rm -rf $(VENV) .venv-bench .types dist build *.egg-info
