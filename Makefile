# `make demo` and `make test` need only Python 3.11 or later and make; everything else is set up in .venv.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := src tests benchmarks docs

.PHONY: install demo test quick lint bench docs lock clean

install: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; }
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: install
	$(BIN)/paperworks compare pack:cardiac_mr --papers unet,unetpp,attention_unet,deeplab_crf --budget 75s --out demo

lint: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright
	$(BIN)/lint-imports

# Two workers with a thread each: with two threads each they wait for one another, and the tests take a quarter longer.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

quick: install
	$(BIN)/python tests/changed.py | xargs $(BIN)/python -m pytest -m "not slow"

# backbones.py and halving.py train, and take most of an hour: run them by name.
bench: install
	$(BIN)/uv pip install --quiet --python $(BIN)/python albumentations==2.0.8 pydensecrf2
	for script in peers startup loading boxes augmentation tiling dense_crf gallery serve; do $(BIN)/python benchmarks/$$script.py || exit 1; done

docs: install
	$(BIN)/python docs/tables.py

lock: install
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra medical --extra video --extra onnx --extra ray --extra serve --extra oracles --extra dev \
		--generate-hashes --no-emit-index-url --no-annotate --custom-compile-command "make lock" -o requirements.lock

clean:
	rm -rf .venv demo runs
