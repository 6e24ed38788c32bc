# make demo, make test: each works as the only command on a fresh clone. The first one installs into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format bench install

BIN := .venv/bin
WORKERS ?= 2
INSTALLED := .venv/.installed

# $(call timed,COMMAND): runs it and says how long it took, whatever its outcome.
timed = @started=$$SECONDS; status=0; $(1) || status=$$?; \
	echo "make $@: $$([ $$status = 0 ] && echo done || echo failed) in $$((SECONDS - started)) s"; exit $$status

help:
	@echo "make demo       the whole story on the embedded tiny model"
	@echo "make test       the tests that take seconds"
	@echo "make test-slow  the tests that take minutes"
	@echo "make lint       style and types"
	@echo "make format     let ruff put style right"
	@echo "make bench      the benchmarks in tools/"

$(INSTALLED): requirements.lock pyproject.toml tools/install.sh
	@tools/install.sh
	@touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	$(call timed,{ $(BIN)/qwq-jax demo && $(BIN)/python -m tools.compare_hf out/demo/checkpoint out/demo/exported; })

test: $(INSTALLED)
	$(call timed,$(BIN)/pytest -n $(WORKERS))

test-slow: $(INSTALLED)
	$(call timed,$(BIN)/pytest -n $(WORKERS) -m slow)

lint: $(INSTALLED)
	$(call timed,{ $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright; })

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(INSTALLED)
	$(call timed,for benchmark in $(wildcard tools/bench_*.py); do echo "== $$benchmark"; $(BIN)/python $$benchmark; done)
