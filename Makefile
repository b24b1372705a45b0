# `make train` and `make test` need only Python on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.installed
NEXT := $(VENV)-next/.installed

.PHONY: train baseline gain test test-fast test-gpu test-next lint style types docs tagged wheel image clean

# Many containers set this; every process of the suite would compile thousands of modules again.
unexport PYTHONDONTWRITEBYTECODE

train: $(ENVIRONMENT)
	$(BIN)/composer-prior train yamls/prior_vit.yaml

baseline: $(ENVIRONMENT)
	$(BIN)/composer-prior train yamls/ntp_vit.yaml

gain: $(ENVIRONMENT)
	$(BIN)/composer-prior train yamls/gain_vit.yaml

test: $(ENVIRONMENT)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(ENVIRONMENT)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-gpu: export CUDA_VISIBLE_DEVICES ?= 0
test-gpu: $(ENVIRONMENT)
	$(BIN)/python -m pytest -m gpu

test-next: $(NEXT)
	$(<D)/bin/python -m pytest -n 2 --dist loadfile

lint: style types

style: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(ENVIRONMENT)
	$(BIN)/mypy

docs: $(ENVIRONMENT)
	$(BIN)/sphinx-build --quiet --nitpicky --fail-on-warning --keep-going -c docs . build/docs

# In a workflow of a tag, the tag has to be the version.
tagged:
	@test "$(GITHUB_REF_TYPE)" != tag || grep -qx '__version__ = "$(GITHUB_REF_NAME:v%=%)"' composer_prior/__init__.py || \
		{ echo "The tag $(GITHUB_REF_NAME) is not v and __version__ of composer_prior/__init__.py."; exit 1; }

wheel: tagged $(ENVIRONMENT)
	$(BIN)/uv build --wheel --out-dir dist

image:
	docker build --tag composer-prior .

# constraints.txt holds tested versions; constraints-next.txt holds newer ones, which Composer and streaming do not ask for.
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
