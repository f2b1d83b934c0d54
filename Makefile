# make test       tests that need Python and pip, nothing else (its own environment in .venv-test)
# make test-all   all tests: builds llama-cpp-python once, installs npm and LangChain clients, tries every Python found
# make lint       ruff and mypy --strict
# make bench      speed of the built-in engine, of starting up, of forwarding, of the encryption, the relay, delegation
# make model      trains the built-in model anew and writes it into dvai_bridge.py (needs PyTorch)

PYTHON ?= python3
DVAI_TEST_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dvai-bridge-tests
TAG    := $(shell $(PYTHON) -c 'import sys; print("py%d.%d" % sys.version_info[:2])')
PIP    := -m pip --quiet --disable-pip-version-check install

.PHONY: test test-all lint bench model clean

test: .venv-test/$(TAG)/ready
	.venv-test/$(TAG)/bin/python -m pytest tests --durations=12 --tb=short -n auto --dist loadfile --no-loadscope-reorder

.venv-test/$(TAG)/ready: tests/requirements.txt
	$(PYTHON) -m venv .venv-test/$(TAG)
	.venv-test/$(TAG)/bin/python $(PIP) -r tests/requirements.txt
	touch $@

test-all:
	PYTHON=$(PYTHON) DVAI_TEST_CACHE=$(DVAI_TEST_CACHE) tests/run_all.sh

lint: .venv-test/lint/ready
	.venv-test/lint/bin/ruff check .
	.venv-test/lint/bin/ruff format --check .
	.venv-test/lint/bin/mypy

.venv-test/lint/ready: tests/requirements-lint.txt
	$(PYTHON) -m venv .venv-test/lint
	.venv-test/lint/bin/python $(PIP) -r tests/requirements-lint.txt
	touch $@

bench:
	$(PYTHON) tests/bench/bench_start.py
	$(PYTHON) tests/bench/bench_health.py
	$(PYTHON) tests/bench/bench_engine.py
	$(PYTHON) tests/bench/bench_forward.py
	$(PYTHON) tests/bench/bench_crypto.py
	$(PYTHON) tests/bench/bench_channel.py
	$(PYTHON) tests/bench/bench_relay.py
	$(PYTHON) tests/bench/bench_delegation.py

model:
	$(PYTHON) tests/train_builtin_model.py

clean:
	rm -rf .venv-test .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
