# Two commands set everything up: `make run` ends in a conversation with the model in the box, `make test` in
# passing tests. Both build the engine into a virtual environment, once; nothing outside this folder changes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py environment.py \
    $(wildcard qwen3c/*/*.pyx qwen3c/*/*.pxd qwen3c/kernels/*.[ch])

.PHONY: help run serve test slow oracles model test-arm bench lint sanitize serial conformance clean

help:
	@grep -E '^## ' Makefile | cut -c4-

## make run        talk to the model in the box (without a terminal: one question)
run: $(VENV)/ready
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/python run.py; \
	else $(BIN)/python run.py -m generate --chat-template -i 'What is 27 + 45?' -s 1; fi

## make serve      the model in the box behind a chat page and an API, at http://127.0.0.1:8080
serve: $(VENV)/serve
	@$(BIN)/python run.py -m serve

# two processes, a file of tests in one of them: on two cores one half waits for terminals while the other computes
SIDE_BY_SIDE := -n 2 --dist loadfile
## make test       all tests but the slow; those that need torch and transformers run after `make oracles`
test: $(VENV)/tests
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

## make slow       the tests that take minutes: what a terminal shows is broken on purpose, and noticed
slow: $(VENV)/tests
	$(BIN)/python -m pytest -m slow

## make oracles    torch and transformers, to train with and to compare with (about 1 GB)
oracles: $(VENV)/ready
	@$(BIN)/python environment.py $(VENV) torch==2.13.0
	@$(BIN)/python environment.py $(VENV) --extras oracles

## make model      train the model in the box from this Python's library: build/model.bin, 100 min; resumes
# Every figure of docs/MODEL_CARD.md comes from these lines, seed 1.
TRAIN := $(BIN)/python train.py
DATA := build/box
model: oracles
	$(BIN)/python recipe/corpus.py $(DATA) --parameters "3 million"
	$(TRAIN) pretrain $(DATA)/text/train --validation $(DATA)/text/validation -o build/base --resume --compile \
	    --preset micro --steps 2900 --batch 8 --learning-rate 3e-3 --warmup 100 --min-learning-rate 0.02 \
	    --evaluate-every 290 --checkpoint-every 145
	$(TRAIN) sft $(DATA)/chat.jsonl --validation $(DATA)/chat_validation.jsonl --model build/base -o build/sft \
	    --resume --compile \
	    --steps 960 --batch 8 --learning-rate 1e-3 --warmup 30 --min-learning-rate 0.05 \
	    --evaluate-every 160 --checkpoint-every 160
	$(TRAIN) grpo $(DATA)/functions.jsonl --model build/sft -o build/grpo --resume \
	    --reward recipe.rewards:either \
	    --steps 60 --batch 16 --micro-batch 32 --max-tokens 128 --learning-rate 1e-4 --warmup 5 \
	    --evaluate-every 20 --checkpoint-every 20
	$(BIN)/python export.py build/grpo build/model.bin --name qwen3c-box
	$(BIN)/python recipe/evaluate.py --base build/base --sft build/sft --grpo build/grpo \
	    --data $(DATA) --json build/figures.json

## make test-arm   the NEON kernels, emulated (Debian: qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
ARM_CC ?= aarch64-linux-gnu-gcc
KERNEL_TEST := -O2 -std=c11 -ffp-contract=off -Iqwen3c/kernels tests/kernels/kernels.c \
    $(wildcard qwen3c/kernels/*.c) -lm
test-arm:
	@mkdir -p build/arm
	$(CC) $(KERNEL_TEST) -o build/arm/here
	$(ARM_CC) -static $(KERNEL_TEST) -o build/arm/arm
	build/arm/here | grep ' scalar ' | sort > build/arm/here.txt
	qemu-aarch64 build/arm/arm | sort > build/arm/arm.txt
	@for isa in scalar neon neon_dotprod; do \
	    grep " $$isa " build/arm/arm.txt | sed "s/ $$isa / scalar /" | diff build/arm/here.txt - \
	    && echo "$$isa: the same bits as here" || exit 1; done

## make bench      the 0.6B shape beside the machine's limits; AGAINST=llama.cpp,openvino,ctranslate2: peers
bench: $(VENV)/ready
	$(BIN)/python benchmarks/bench.py $(if $(AGAINST),--against $(AGAINST))

# packages of an extra of pyproject.toml that is one line there, quoted for the shell
extra = $(shell sed -n 's/^$(1) = \[\(.*\)\].*/\1/p' pyproject.toml | sed 's/", "/" "/g')
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

TYPED = $(sort $(dir $(wildcard tests/*.py tests/*/*.py benchmarks/*.py recipe/*.py)))
## make lint       style and types, of the package, its tests and its scripts
lint: $(VENV)/tests
	$(PIP) $(call extra,lint)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	@for folder in $(TYPED); do echo "mypy $$folder" && $(BIN)/mypy $$folder*.py || exit 1; done

# a build of its own, in a copy: build/NAME/ has the sources, and the engine compiled by what $(1) sets
apart = mkdir -p build/$@ && rm -rf build/$@/qwen3c build/$@/tests \
    && tar -c --exclude '*.so' --exclude __pycache__ \
    qwen3c tests docs *.py *.toml *.md Makefile | tar -x -C build/$@ && $(PIP) $(call extra,build) \
    && cd build/$@ && $(1) $(abspath $(BIN))/python setup.py -q build_ext --inplace -j 2

## make sanitize   engine, format and kernel tests under AddressSanitizer and UBSan (gcc), in build/sanitize
# without use-after-scope, which takes gcc ten minutes over the hundreds of small structs of scalar.c
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all \
    -fno-sanitize-address-use-after-scope -g -O1
ASAN = $(shell $(CC) -print-file-name=libasan.so)
sanitize: $(VENV)/tests
	@case "$(ASAN)" in /*) ;; *) echo "make sanitize needs gcc with its libasan, $(CC) has none" \
	    "(CC=gcc-12 names another)" >&2; exit 1;; esac
	@$(call apart,QWEN3C_CFLAGS="$(SANITIZE)")
	cd build/$@ && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD=$(ASAN) \
	    $(abspath $(BIN))/python -m pytest $(SIDE_BY_SIDE) \
	    tests/engine/test_engine.py tests/test_format.py tests/test_reference.py
	cd build/$@ && $(CC) $(SANITIZE) -std=c11 -Iqwen3c/kernels tests/kernels/kernels.c \
	    $$(ls build/temp*/qwen3c/kernels/*.o | grep -v /table.o) -lm -o kernels \
	    && ./kernels > kernels.txt && tail -n 1 kernels.txt
	cd build/$@ && $(CC) $(SANITIZE) -std=c11 -D_POSIX_C_SOURCE=200809L -pthread -Iqwen3c/kernels \
	    tests/kernels/team.c -o team \
	    && ./team 5 5 0 400 && ./team 4 4 2 400 && ./team 3 3 1 200

## make serial     what computes, tested in a build without OpenMP, in build/serial
# without tests/kernels, which builds its own program from kernels that know no OpenMP: `make test` has run the same
serial: $(VENV)/tests
	@$(call apart,QWEN3C_OPENMP=0) && $(abspath $(BIN))/python -m pytest $(SIDE_BY_SIDE) \
	    tests/engine/test_engine.py tests/test_reference.py tests/test_format.py tests/convert/test_export.py \
	    tests/drivers

## make conformance  clients and suites of others against -m serve: npm and pip fetch them into build/conformance
conformance: $(VENV)/tests
	$(BIN)/python tests/serve/conformance.py build/$@

## make clean      remove everything that was built
clean:
	rm -rf $(VENV) build dist *.egg-info qwen3c/*/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# what goes beyond `make run`: the server's libraries; those of the tests, some of them clients that others wrote
$(VENV)/serve: $(VENV)/ready
	@$(BIN)/python environment.py $(VENV) --extras serve mcp
	@touch $@

$(VENV)/tests: $(VENV)/ready
	@$(BIN)/python environment.py $(VENV) --extras test
	@touch $@

$(VENV)/ready: $(SOURCES)
	@command -v $(PYTHON) > /dev/null \
	    || { echo "qwen3c: $(PYTHON) is not installed; Python 3.10 or later is needed" >&2; exit 1; }
	@$(PYTHON) setup.py missing venv
	@$(PYTHON) environment.py $(VENV) -e .
	@touch $@
