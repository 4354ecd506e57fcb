# make sample   generate text with the demo model     make test   run the tests
# make setup    install all that commands need        make lint   what the continuous check runs first
# Each installs first what it needs.

PYTHON ?= python3.11
PROMPT ?= ROMEO:
BIN := .venv/bin
READY := .venv/.ready
DEVELOP := .venv/.develop

.PHONY: setup sample test lint format clean

setup: $(DEVELOP)

# What sampling needs.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# What all else needs: PyTorch for conversion and tests, the TPU and CUDA compilers for the planners.
# torch first and pinned: an unpinned one drags in gigabytes of CUDA.
$(DEVELOP): $(READY)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[convert,hf,plan,plot,train,dev]'
	touch $@

sample: $(READY)
	$(BIN)/python -m infer.sample --prompt "$(PROMPT)" --echo --max-new-tokens 200

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
