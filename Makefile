# Names for plain commands. Every target sets up what it needs; a second call reuses it.

PYTHON := .venv/bin/python
READY := .venv/.ready
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)

# idle threads sleep instead of spinning: a busy machine then slows small problems tenfold less
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test lint bench clean

demo: $(READY)  ## docstrings -> tiny LM -> moments -> NTPS, with a table and a picture
	$(PYTHON) cache.py --split train
	$(PYTHON) cache.py --split test
	$(PYTHON) K_sweep.py

test: lint  ## ruff, mypy, pytest
	$(PYTHON) -m pytest -n 2

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy .

bench: $(READY)  ## every performance claim of the README, measured here
	$(PYTHON) benchmarks/bench_cache.py
	$(PYTHON) benchmarks/bench_k_sweep.py
	$(PYTHON) benchmarks/bench_sklearn.py
	$(PYTHON) benchmarks/bench_linear_training.py
	$(PYTHON) benchmarks/bench_training.py

clean:
	rm -rf .venv results demo/cache

$(READY): requirements.txt
	$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(BASE_PYTHON) -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(READY)
