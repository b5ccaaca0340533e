# Everything runs in .venv, which is made with python3, venv and pip alone.
PYTHON ?= python3
BIN := .venv/bin

# The pip that comes with an older Python takes twice the time; without a newer one, it does.
NEWER_PIP := $(BIN)/pip install --quiet --upgrade pip || true
# pip compiles all that it installs, a file after another, tests included. Here all cores do it. What is left out
# is compiled where it is imported, if ever; some files are for other Pythons.
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt
RARE := tests?|testing|types|lexers|pip|setuptools|sklearn|mypy|mypyc|playwright|tensorboard|grpc|fontTools
RARE := $(RARE)|hypothesis|narwhals|babel|pymdownx|material|backrefs|torchgen|onnx|physics|stats|signal|interpolate|integrate
RARE := /($(RARE))/|/transformers/models/(?!__init__|auto/|clip/|llama/|llava|qwen|siglip)
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib -x '$(RARE)' || true

.PHONY: demo install test checks suite slow newest oldest constraints docs embedded clean

# A question about a photograph of 9 megapixels, answered by the model that comes with the package.
demo: .venv/core
	$(BIN)/foveate ask examples/signs.jpg "what digit is on the red shape?" --out demo.png

install: .venv/installed

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(NEWER_PIP)
	$(PIP_INSTALL) --editable .
	$(COMPILE)
	touch $@

# All at once: what the package alone needs is part of it.
.venv/installed: pyproject.toml constraints.txt tests/demo/requirements.txt
	$(PYTHON) -m venv .venv
	$(NEWER_PIP)
	$(PIP_INSTALL) --editable '.[dev,docs]'
	$(PIP_INSTALL) --no-deps --requirement tests/demo/requirements.txt
	$(COMPILE)
	touch .venv/core $@

# Lint, then docs and types beside the tests: the last line is pytest's, which takes longest. One thread per
# process: on two cores, the threads of several processes would wait for each other. Bytecode is kept, whatever
# the environment says, for the interpreters that tests start.
test slow: export OMP_NUM_THREADS ?= 1
test slow: export PYTHONDONTWRITEBYTECODE =
test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory --jobs 2 checks suite

checks: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/mypy --no-error-summary

suite: install
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The tests that `make test` leaves out.
slow: install
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m slow

# What moves with the versions of other libraries: with the newest of everything, whatever the bounds say, and
# with the lower bounds; each in an environment of its own, made anew.
newest oldest: export OMP_NUM_THREADS ?= 1
newest: export PIP_CONSTRAINT = /dev/null
newest oldest:
	$(PYTHON) -m venv --clear .venv-$@
	.venv-$@/bin/python tools/requirements.py $@ > .venv-$@/requirements.txt
	.venv-$@/bin/pip install --quiet --requirement .venv-$@/requirements.txt
	.venv-$@/bin/pip install --quiet --no-deps --editable .
	.venv-$@/bin/pip list
	.venv-$@/bin/pytest tests/core tests/picture tests/towers tests/model tests/parity/test_transformers.py \
		tests/methods/test_invariants.py tests/test_main_job.py

# constraints.txt: what pip takes today, for each of these Pythons.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
constraints: install
	mkdir -p build
	for python in $(PYTHONS); do \
		name=build/$$(basename $$python); \
		$$python -m venv --clear $$name && $$name/bin/pip install --quiet --dry-run --ignore-installed \
			--report $$name.json --editable '.[dev,docs]' torch==2.13.0 || exit 1; \
	done
	$(BIN)/python tools/requirements.py constraints $(foreach python,$(PYTHONS),build/$(notdir $(python)).json) > constraints.new
	mv constraints.new constraints.txt

# The documentation on http://127.0.0.1:8000, built anew whenever a page changes; it links to this clone's origin.
docs: export REPO_URL ?= $(shell git remote get-url origin 2>/dev/null | grep '^https\?:')
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# Trains the embedded model again, from nothing: about two hours on one core.
embedded: export OMP_NUM_THREADS ?= 1
embedded: install
	$(BIN)/foveate lab prepare --scale small --parts tower,reader
	$(BIN)/foveate lab run --methods anyres --level signs --scale small
	$(BIN)/foveate lab export build/embedded --method anyres --level signs --scale small

clean:
	rm -rf .venv .venv-newest .venv-oldest site build
