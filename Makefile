# Needs Python 3.11 or newer, git and make; everything else goes into .venv.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
# Without sam2's CUDA extension: it only fills holes in finished masks, and samlove does not use that.
INSTALL := SAM2_BUILD_CUDA=0 PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	$(BIN)/python -m pip install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo ablations test lint format docs

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST) | while IFS='	' read -r target meaning; do \
		printf '  make %-9s %s\n' "$$target" "$$meaning"; done

install: $(INSTALLED) ## install everything into .venv; repeat after a change of pyproject.toml or constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer not found; install it, or choose one: make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "installing into .venv: once, about 3 minutes$(if $(filter demo,$(MAKECMDGOALS)),; then the pipeline runs: about 12 minutes on 2 cores)"
	@$(PYTHON) -m venv .venv
	@$(INSTALL) -e ".[dev]"
	@touch $@

demo: $(INSTALLED) ## run the whole pipeline on the generated dataset; print result table and report
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m samlove.cli.demo

ablations: $(INSTALLED) ## run the ablations of the active profile in parallel; print their tables
	@cp pipelines/ablations/pipeline.yaml pipelines/ablations/dvc.yaml
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m dvc repro pipelines/ablations/dvc.yaml

test: $(INSTALLED) ## run the test suite
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 python -m pytest -q -n auto --dist loadfile

lint: $(INSTALLED) ## run ruff, mypy and import-linter, as CI does
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@report=$$($(BIN)/lint-imports --no-cache --no-logo) || { echo "$$report"; exit 1; }

format: $(INSTALLED) ## fix what ruff can fix, and format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

docs: $(INSTALLED) ## build the documentation into site/; checks its links
	@$(BIN)/python -c "import mkdocs" 2>/dev/null || $(INSTALL) -e ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build  # --quiet would also hide warnings from strict mode
