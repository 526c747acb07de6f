# make demo      train on the embedded pictures, evaluate, write runs/demo/report.html
# make test      format, lint, types and all tests but the slow ones
# make test-all  the slow ones too
# make pytest    the tests alone, as for a second Python (VENV=.venv312 PYTHON=python3.12)
# make lock      requirements.txt anew from setup.py (needs uv)

VENV ?= .venv
PYTHON ?=
BIN := $(VENV)/bin
# Each worker begins with a half, so that what a file's tests share is made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
.PHONY: demo test test-all pytest check setup lock clean

setup:
	@PYTHON="$(PYTHON)" bash launch/setup.sh $(VENV)

demo: setup
	$(BIN)/python -m navit_jax.train --config=configs/smoke.py --workdir=runs/demo
	$(BIN)/python -m navit_jax.plan --config=configs/smoke.py --packing --images \
	  --picture=runs/demo/rows.png
	$(BIN)/python -m navit_jax.evaluate --workdir=runs/demo --split=test \
	  --sides=32,48,64,96,128 --baselines
	$(BIN)/python -m navit_jax.report runs/demo
	@echo
	@echo "Open runs/demo/report.html in a browser. Next, on your own pictures, a sub-folder"
	@echo "for each class:"
	@echo "  $(BIN)/python -m navit_jax.train --config=configs/folder.py:/path/to/pictures --workdir=runs/mine"
	@echo "More: docs/running.md; how and why: docs/design.md."

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

pytest: setup
	$(PYTEST) -m "not slow"

test: check pytest

test-all: check
	$(PYTEST)

lock:
	uv pip compile --quiet --universal --generate-hashes --no-header \
	  --python-version 3.11 --extra test setup.py -o requirements.txt

clean:
	rm -rf .venv* .cache runs *.egg-info .pytest_cache .ruff_cache
