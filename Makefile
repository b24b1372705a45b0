# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.installed

.PHONY: train test lint clean

# Where this is set, as in many containers, each of the suite's processes compiles thousands of modules anew.
unexport PYTHONDONTWRITEBYTECODE

train: $(ENVIRONMENT)
	$(BIN)/composer-prior train yamls/prior_vit.yaml

test: $(ENVIRONMENT)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# uv installs what pip would, several times faster; constraints.txt holds versions that are known to work together.
$(ENVIRONMENT): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) data runs
