# make sample   set up and generate text          make test   set up and run the tests
# make setup    only set up                       make lint   what the continuous check runs first

PYTHON ?= python3.11
PROMPT ?= Subject to the terms and conditions
BIN := .venv/bin
READY := .venv/.ready
DEVELOP := .venv/.develop

.PHONY: setup sample test lint format clean

setup: $(DEVELOP)

# torch first and pinned: an unpinned one drags in gigabytes of CUDA.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[convert,hf,train]'
	touch $@

# What tests need: the TPU and CUDA compilers too.
$(DEVELOP): $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[convert,hf,plan,plot,train,dev]'
	touch $@

# By way of Meta's format, as a released checkpoint would come. Prerequisites behind the bar must
# exist and may be newer: a finished directory is never made again.
out/tiny-trained/model: | $(READY)
	rm -rf out/tiny-trained
	$(BIN)/python -m train.tiny --output out/tiny-trained

out/tiny-meta: | out/tiny-trained/model
	$(BIN)/python -m convert.orbax_to_meta --checkpoint out/tiny-trained/model --output $@

out/tiny: | out/tiny-meta
	$(BIN)/python -m convert.meta_to_orbax --input out/tiny-meta --output $@ --verify

sample: $(READY) out/tiny
	$(BIN)/python -m infer.sample --checkpoint out/tiny --prompt "$(PROMPT)" --echo --max-new-tokens 100

# A file's tests stay together: they share what they compile.
test: $(DEVELOP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(DEVELOP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(DEVELOP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv out
