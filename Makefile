# make demo           text from the bundled model         make demo PROMPT="Once upon a time" EXTRAS=cuda13
# make test           the suite, pinned versions          make test ARGS="tests/model -k rope"
# make test-thorough  and the cases that not every change needs
# make test-latest    the core tests, newest releases
# make setup          what make test runs in, and no test
# make lint           ruff, pyright, import-linter
# make format         rewrites files as `make lint` wants them
# make clean          removes what these made
#
# Each target sets up all that it needs. A set-up is made again only when what it depends on changes.

VENV ?= .venv
# Accelerator support to install as well: cuda12, cuda13, or nothing for the CPU.
EXTRAS ?=
PROMPT ?= The lighthouse keeper
SEED ?= 9
WORKERS ?= 2
ARGS ?=

comma := ,
VENV_LATEST := $(VENV)-latest
BIN := $(VENV)/bin
SETUP := pyproject.toml constraints.txt tools/install.sh
CORE := $(VENV)/.installed-core$(EXTRAS:%=-%)
TEST := $(VENV)/.installed-test$(EXTRAS:%=-%)
# What a new release of jax, flax, orbax, tokenizers, torch, transformers or ptxas can break.
CORE_TESTS := tests/config tests/model tests/checkpoint tests/generate tests/pallas_kernels/test_compiled.py
PYTEST_OPTIONS := -n $(WORKERS) --dist worksteal

export PYTHON
# With it each process compiles all that it imports anew: seconds, in each of hundreds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-thorough test-latest lint format clean

setup: $(TEST)

demo: $(CORE)
	@$(BIN)/python scripts/generate.py "$(PROMPT)" --full-text --max-new-tokens 80 \
		--temperature 0.8 --min-p 0.05 --repetition-penalty 1.1 --seed $(SEED)

test: $(TEST)
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) $(ARGS)

test-thorough: $(TEST)
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) --thorough $(ARGS)

# No stamp: "newest" is asked for each time.
test-latest:
	sh tools/install.sh $(VENV_LATEST) test$(EXTRAS:%=$(comma)%) --upgrade
	@$(VENV_LATEST)/bin/python -m uv pip freeze --python $(VENV_LATEST)/bin/python \
		| grep -E '^(jax|jaxlib|flax|optax|orbax-checkpoint|numpy|tokenizers|torch|transformers)=='
	$(VENV_LATEST)/bin/python -m pytest $(PYTEST_OPTIONS) $(CORE_TESTS) $(ARGS)

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV_LATEST) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CORE): $(SETUP)
	@echo "Setting up $(VENV): the package and what it depends on"
	@sh tools/install.sh $(VENV) "$(EXTRAS)" -c constraints.txt
	@touch $@

$(TEST): $(SETUP)
	@echo "Setting up $(VENV): the package, the test tools, torch and transformers, a GPU's compiler"
	@sh tools/install.sh $(VENV) test$(EXTRAS:%=$(comma)%) -c constraints.txt
	@touch $@
