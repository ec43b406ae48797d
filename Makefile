# Each goal does its own set-up: .venv, and with root the Debian packages it needs.

CONTAINERS ?= 1000
FS ?= ext4
ARGS ?=

BIN := .venv/bin

.PHONY: help demo prove judge test test-long test-containers bench deb lint format types floors clean

help:
	@echo 'make demo [CONTAINERS=1000] [FS=ext4|xfs|btrfs]  one writeback error, and who is told of it'
	@echo 'make test           the test suite'
	@echo 'make test-long      the tests that take minutes'
	@echo 'make test-containers   of these, podman and buildah on overt'
	@echo 'make prove          which design tells whom, checked over every history'
	@echo 'make judge [ARGS=--fs=xfs]  the use cases on every overlay here, and report.html'
	@echo 'make bench          overt beside the other overlays, in ratios; its checker beside SPIN'
	@echo 'make deb            a Debian package, in dist/'
	@echo 'make lint types floors   ruff, mypy, import-linter'
	@echo 'make format         let ruff rewrite'
	@echo 'make clean          remove .venv and the caches'

.venv/runtime: pyproject.toml tools/venv
	@tools/venv .
	@touch $@

.venv/dev: pyproject.toml tools/venv
	@tools/venv '.[dev]'
	@touch $@ .venv/runtime

# A missing package costs the tests or rows that need it, which say so themselves.
demo: .venv/runtime
	@tools/debian-packages demo || :
	@$(BIN)/overt demo --containers $(CONTAINERS) --fs $(FS) $(ARGS)

prove: .venv/runtime
	@$(BIN)/overt prove $(ARGS)

judge: .venv/runtime
	@tools/debian-packages judge || :
	@$(BIN)/overt judge --html report.html $(ARGS)

bench: .venv/runtime
	@tools/debian-packages bench || :
	@$(BIN)/python tools/bench-prove
	@$(BIN)/overt bench $(ARGS)

test: .venv/dev
	@tools/debian-packages test || :
	@$(BIN)/python -m pytest $(ARGS)

test-long: .venv/dev
	@tools/debian-packages test || :
	@$(BIN)/python -m pytest -m long $(ARGS)

test-containers: .venv/dev
	@tools/debian-packages containers || :
	@$(BIN)/python -m pytest tests/containers $(ARGS)

deb: .venv/runtime
	@PYTHON=$(BIN)/python tools/deb

lint: .venv/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: .venv/dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: .venv/dev
	@$(BIN)/mypy

floors: .venv/dev
	@$(BIN)/lint-imports

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
