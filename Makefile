# make demo, make test: each works as the only command on a fresh clone. The first one installs into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
TINY := out/tiny-reasoner
SHIPPED := qwq_jax/embedded/tiny-reasoner
STAGES := out/tiny-stages
GRPO := out/rl/tiny_grpo
COMMA := ,

.PHONY: help demo test test-slow test-exhaustive lint format bench install tiny-reasoner tiny-grpo tiny-stages

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
	@echo "make test-exhaustive  slow tests that are near enough to others"
	@echo "make lint       style and types"
	@echo "make format     let ruff put style right"
	@echo "make tiny-reasoner  trains the embedded model again, from nothing"
	@echo "make tiny-grpo  reinforcement learning on the embedded model: three seeds, and the reward's sign turned"
	@echo "make tiny-stages  QwQ's two stages of reinforcement learning on the embedded model"
	@echo "make bench      the benchmarks in tools/ that need neither a model nor a GPU"

$(INSTALLED): requirements.lock pyproject.toml tools/install.sh
	@tools/install.sh
	@touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	$(call timed,{ $(BIN)/qwq-jax demo && JAX_PLATFORMS=cpu $(BIN)/python -m tools.compare_hf out/demo/checkpoint out/demo/exported; })

test: $(INSTALLED)
	$(call timed,$(BIN)/pytest -n $(WORKERS) --dist worksteal)

test-slow: $(INSTALLED)
	$(call timed,$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "slow and not exhaustive")

test-exhaustive: $(INSTALLED)
	$(call timed,$(BIN)/pytest -n $(WORKERS) --dist worksteal -m exhaustive)

lint: $(INSTALLED)
	$(call timed,{ $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright; })

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Those that make what they need; the others want a GPU or a model that is here.
ELSEWHERE := tools/bench_gpu.py tools/bench_lookup.py tools/bench_quantization.py

bench: $(INSTALLED)
	$(call timed,( for benchmark in $(filter-out $(ELSEWHERE),$(wildcard tools/bench_*.py)); do \
		echo "== $$benchmark"; $(BIN)/python -m tools.$$(basename $$benchmark .py) || exit; done ))

# The recipe of the embedded model: data, tokenizer, training, export into the package.
tiny-reasoner: $(INSTALLED)
	$(call timed,{ $(BIN)/python tools/make_tiny_reasoner_data.py $(TINY)/train.jsonl --count 60000 --seed 1 --levels 1 2 3 \
		&& $(BIN)/python tools/make_tiny_reasoner_data.py $(TINY)/held_out.jsonl --count 512 --seed 2 --split held-out --levels 1 2 3 \
		&& $(BIN)/python tools/make_tiny_tokenizer.py $(TINY)/tokenizer \
		&& $(BIN)/qwq-jax sft configs/sft/tiny_reasoner.toml \
		&& rm -rf $(SHIPPED).new \
		&& $(BIN)/qwq-jax export $$(ls -d $(TINY)/run/model-* | tail -n 1) $(SHIPPED).new \
		&& rm -rf $(SHIPPED) && mv $(SHIPPED).new $(SHIPPED); })

# Half an hour; a run that was interrupted goes on.
tiny-grpo: $(INSTALLED)
	$(call timed,{ $(foreach seed,0 1 2,$(BIN)/qwq-jax rl configs/rl/tiny_grpo.toml --set seed=$(seed) --set output_dir=$(GRPO)-$(seed) &&) \
		$(BIN)/qwq-jax rl configs/rl/tiny_grpo.toml --set output_dir=$(GRPO)-flipped --set stop_after=30 \
			--set 'rewards=[{kind="arithmetic"$(COMMA)weight=-1.0}]' \
		&& $(BIN)/python -m tools.tiny_grpo_report $(GRPO)-0 $(GRPO)-1 $(GRPO)-2 --flipped $(GRPO)-flipped --write docs/benchmarks/tiny_grpo.md; })

# QwQ's two stages in their tiny form; each command goes on where it was interrupted.
tiny-stages: $(INSTALLED)
	$(call timed,{ $(BIN)/python tools/make_tiny_stages.py $(STAGES) \
		&& $(BIN)/qwq-jax sft configs/rl/tiny_stages/cold_start.toml \
		&& JAX_PLATFORMS=cpu $(BIN)/python tools/make_tiny_preferences.py $(STAGES)/preferences --count 600 --held-out 100 \
			--model $$(ls -d $(STAGES)/cold-start/model-*) \
		&& $(BIN)/qwq-jax reward-model configs/rl/tiny_stages/reward_model.toml \
		&& $(BIN)/qwq-jax rl configs/rl/tiny_stages/stage1.toml \
		&& $(BIN)/qwq-jax rl configs/rl/tiny_stages/stage2.toml \
		&& $(BIN)/python -m tools.tiny_stages_report $(STAGES) --write docs/benchmarks/tiny_stages.md; })
