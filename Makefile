# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.installed
NEXT := $(VENV)-next/.installed

.PHONY: train test test-next lint clean

# Where this is set, as in many containers, each of the suite's processes compiles thousands of modules anew.
unexport PYTHONDONTWRITEBYTECODE

train: $(ENVIRONMENT)
	$(BIN)/composer-prior train yamls/prior_vit.yaml

test: $(ENVIRONMENT)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-next: $(NEXT)
	$(<D)/bin/python -m pytest -n 2 --dist loadfile

lint: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# uv installs what pip would, several times faster; constraints.txt holds versions that are known to work together, and
# constraints-next.txt newer ones, which Composer and streaming do not ask for.
$(ENVIRONMENT): VERSIONS := --constraint constraints.txt
$(ENVIRONMENT): constraints.txt
$(NEXT): VERSIONS := --constraint constraints-next.txt --override overrides-next.txt
$(NEXT): constraints-next.txt overrides-next.txt
$(ENVIRONMENT) $(NEXT): pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet uv
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python $(VERSIONS) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-next data runs
