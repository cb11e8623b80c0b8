# Needs Python 3.11 or newer, git and make; everything else goes into .venv.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
# sam2's CUDA extension only fills holes in masks after the fact, which samlove does not ask for.
INSTALL := SAM2_BUILD_CUDA=0 PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST) | while IFS='	' read -r target meaning; do \
		printf '  make %-9s %s\n' "$$target" "$$meaning"; done

install: $(INSTALLED) ## make .venv with everything in it (again only when pyproject.toml or constraints.txt change)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer expected, none found; or name it: make PYTHON=..." >&2; exit 2; }
	@echo "installing into .venv (minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(INSTALL)
	@touch $@

demo: $(INSTALLED) ## the whole pipeline on the embedded data set: result table and report
	@grep -q '^profile: micro\b' configs/profile.yaml || { \
		echo "error: configs/profile.yaml selects another profile than micro; set it back, or run: dvc repro" >&2; exit 2; }
	@PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro
	@$(BIN)/python -m pipelines.table

test: $(INSTALLED) ## the test suite
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest -q

lint: $(INSTALLED) ## ruff and mypy, as CI runs them
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(INSTALLED) ## let ruff mend what it can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format
