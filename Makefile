# Everything but `floor` runs in .venv, at the exact versions of constraints.txt. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
FLOOR := .venv-floor
INSTALL_DEPENDS := $(BIN)/python pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test floor check docs docs-serve clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.demo ## learn one person's taste from a few clicks (examples/quickstart.py)
	@$(BIN)/python examples/quickstart.py

# One process a core with one thread each: tiny models gain nothing from threads.
test: $(VENV)/.dev ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# Old versions warn of one another, so their warnings are shown and are not errors.
floor: $(FLOOR)/.installed ## smoke test at the oldest versions that pyproject.toml allows, in an environment of them
	@$(FLOOR)/bin/python -m pytest -o filterwarnings=default tests/floor

check: $(VENV)/.dev ## lint, formatting, types, and the direction of the imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy bt_hf
	@$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_english.py

# The theme tells on each start that another one will succeed it; it is kept until May 2027.
docs: $(VENV)/.docs ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs-serve: $(VENV)/.docs ## show the documentation on http://127.0.0.1:8000, and again after each change
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean: ## remove the environments, builds and caches
	rm -rf $(VENV) $(FLOOR) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find bt_hf tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python $(FLOOR)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("bt_hf needs Python 3.11 or newer, but " \
	    + sys.executable + " is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	@echo "Creating $(@:/bin/python=) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(@:/bin/python=)

# A stamp is newer than what it was installed from, so that nothing is installed twice. The tests run the examples
# too, so the development environment is the demo's and more.
$(VENV)/.demo: $(INSTALL_DEPENDS)
	@echo "Installing bt_hf and what the demo needs into $(VENV) (PyTorch is large: minutes the first time) ..."
	@$(PIP) install -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(INSTALL_DEPENDS)
	@echo "Installing bt_hf and its development tools into $(VENV) (PyTorch is large: minutes the first time) ..."
	@$(PIP) install -c constraints.txt -e '.[demo,dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: $(INSTALL_DEPENDS)
	@echo "Installing bt_hf and what the documentation needs into $(VENV) (PyTorch is large: minutes the first time) ..."
	@$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

# Of the development tools only what the smoke test needs: the others have no floor that users meet.
$(FLOOR)/.installed: $(FLOOR)/bin/python pyproject.toml constraints-floor.txt
	@echo "Installing bt_hf and its oldest dependencies into $(FLOOR) ..."
	@$(FLOOR)/bin/python -m pip --disable-pip-version-check --quiet install \
	    -c constraints-floor.txt -e '.[demo]' pytest starlette uvicorn
	@touch $@
