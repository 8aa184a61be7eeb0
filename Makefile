# Every target does its own set-up from a bare clone: the environment in .venv and, as root on Debian/Ubuntu, the
# outside tools. IMAGEKIT_NO_APT=1 leaves the system alone. `make help` lists the targets.

VENV   ?= .venv
PYTHON ?=
MARKS  ?= not slow
# Processes that share the tests; `make coverage` measures in one.
JOBS   ?= 2
# Seconds of `make fuzz`.
TIME   ?= 600

bin    := $(VENV)/bin
# `make coverage` replaces it by "coverage run".
python := $(bin)/python

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: venv tools-demo tools-test tools-all tools-bench erase-coverage ruff mypy mypy-win32 imports
.PHONY: help demo test test-slow test-all test-nova coverage lint fuzz bench lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo
	@echo "Set-up is part of each. PYTHON=python3.13 VENV=.venv-3.13 picks another interpreter; IMAGEKIT_NO_APT=1 leaves the system alone."

demo: venv tools-demo ## the tour: convert, config drive, boot, on input it makes itself
	@rm -rf demo-out
	@$(bin)/imagekit demo

test: venv tools-test ## the tests, without the slow ones
	$(python) -m pytest -ra -n $(JOBS) --dist worksteal -m "$(MARKS)"

test-slow: venv tools-all ## the slow tests only: real guests, large images
	$(python) -m pytest -ra -n $(JOBS) --dist worksteal -m slow

test-all: test test-slow ## all tests

coverage: python = $(bin)/coverage run
coverage: JOBS = 0
coverage: erase-coverage test ## the tests without the slow ones, in one process, and what of the code they run
	$(bin)/coverage combine --quiet
	$(bin)/coverage report

test-nova: venv tools-all ## real Nova and compute-hyperv with our utilities plugged in
	$(python) -m pytest -ra tests/test_against_nova.py

erase-coverage: venv
	@$(bin)/coverage erase

lint: ruff mypy mypy-win32 imports ## ruff, mypy for Linux and Windows, import-linter

ruff: venv
	$(bin)/ruff check --output-format concise .
	$(bin)/ruff format --check .

mypy: venv
	$(bin)/mypy --platform linux

mypy-win32: venv
	$(bin)/mypy --platform win32 --cache-dir .mypy_cache/win32

imports: venv
	$(bin)/lint-imports --no-logo

fuzz: venv ## fuzzing with atheris, for TIME seconds, from the hostile corpus
	@$(bin)/python -c 'import atheris' 2>/dev/null || $(bin)/python -m pip install -q -r tests/fuzz/requirements.txt
	@test -d build/fuzz || $(bin)/python -m fixtures.hostile --small build/fuzz
	$(bin)/python -m tests.fuzz.target build/fuzz -max_len=65536 -timeout=5 -rss_limit_mb=512 -max_total_time=$(TIME)

bench: venv tools-bench ## the benchmarks, against qemu-img and others (BENCH="--quick" for a short run)
	$(bin)/python -m tests.benchmarks $(BENCH)

venv:
	@scripts/venv.sh "$(VENV)" "$(PYTHON)"

tools-demo tools-test tools-all tools-bench: tools-%:
	@scripts/tools.sh $*

lock: ## renew the pins in requirements/ from pyproject.toml
	python3 -m venv --clear build/lock
	build/lock/bin/python -m pip install -qq uv
	build/lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 \
		--custom-compile-command "make lock" -o requirements/dev.txt pyproject.toml requirements/dev.in

clean: ## remove what the targets made, except .venv
	rm -rf build dist .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
