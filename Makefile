# Two commands set everything up: `make run` ends in a conversation with the model in the box, `make test` in
# passing tests. Both build the engine into a virtual environment, once; nothing outside this folder changes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard qwen3c/*.pyx qwen3c/*.pxd qwen3c/kernels/*)

.PHONY: help run test oracles model test-arm bench lint clean

help:
	@grep -E '^## ' Makefile | cut -c4-

## make run        talk to the model in the box (without a terminal: one question)
run: $(VENV)/ready
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/python run.py; \
	else $(BIN)/python run.py -m generate --chat-template -i 'What is 27 + 45?' -s 1; fi

## make test       all tests; those that need torch and transformers run after `make oracles`
test: $(VENV)/ready
	$(BIN)/python -m pytest

## make oracles    torch and transformers, to train with and to compare with (about 1 GB)
oracles: $(VENV)/ready
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[oracles]'

## make model      train the model in the box from this Python's library, into build/model.bin (100 minutes, two cores); resumes
# Every figure of docs/MODEL_CARD.md comes from these lines, seed 1.
TRAIN := $(BIN)/python train.py
DATA := build/box
model: oracles
	$(BIN)/python recipe/corpus.py $(DATA) --parameters "3 million"
	$(TRAIN) pretrain $(DATA)/text/train --validation $(DATA)/text/validation -o build/base --resume --compile \
	    --preset micro --steps 2900 --batch 8 --learning-rate 3e-3 --warmup 100 --min-learning-rate 0.02 \
	    --evaluate-every 290 --checkpoint-every 145
	$(TRAIN) sft $(DATA)/chat.jsonl --validation $(DATA)/chat_validation.jsonl --model build/base -o build/sft --resume --compile \
	    --steps 960 --batch 8 --learning-rate 1e-3 --warmup 30 --min-learning-rate 0.05 \
	    --evaluate-every 160 --checkpoint-every 160
	$(TRAIN) grpo $(DATA)/functions.jsonl --model build/sft -o build/grpo --resume --reward recipe.rewards:either \
	    --steps 60 --batch 16 --micro-batch 32 --max-tokens 128 --learning-rate 1e-4 --warmup 5 \
	    --evaluate-every 20 --checkpoint-every 20
	$(BIN)/python export.py build/grpo build/model.bin --name qwen3c-box
	$(BIN)/python recipe/evaluate.py --base build/base --sft build/sft --grpo build/grpo --data $(DATA) --json build/figures.json

## make test-arm   the NEON kernels under qemu-user (Debian: qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
ARM_CC ?= aarch64-linux-gnu-gcc
KERNEL_TEST := -O2 -std=c11 -ffp-contract=off -Iqwen3c/kernels tests/kernels.c $(wildcard qwen3c/kernels/*.c) -lm
test-arm:
	@mkdir -p build/arm
	$(CC) $(KERNEL_TEST) -o build/arm/here
	$(ARM_CC) -static $(KERNEL_TEST) -o build/arm/arm
	build/arm/here | grep ' scalar ' | sort > build/arm/here.txt
	qemu-aarch64 build/arm/arm | sort > build/arm/arm.txt
	@for isa in scalar neon neon_dotprod; do \
	    grep " $$isa " build/arm/arm.txt | sed "s/ $$isa / scalar /" | diff build/arm/here.txt - \
	    && echo "$$isa: the same bits as here" || exit 1; done

## make bench      the 0.6B shape beside the machine's limits; AGAINST=llama.cpp,openvino,ctranslate2 adds peers
bench: $(VENV)/ready
	$(BIN)/python benchmarks/bench.py $(if $(AGAINST),--against $(AGAINST))

## make lint       style and types of the Python sources
lint: $(VENV)/ready
	$(BIN)/python -m pip install -q ruff mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

## make clean      remove everything that was built
clean:
	rm -rf $(VENV) build dist *.egg-info qwen3c/engine.c qwen3c/forward.c qwen3c/kernels.c qwen3c/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/ready: $(SOURCES)
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) is not installed; Python 3.10 or later is needed" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@
