# Names for plain commands. Every target sets up what it needs; a second call reuses it.

PYTHON := .venv/bin/python
READY := .venv/.ready
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)

# idle threads sleep instead of spinning: a busy machine then slows small problems tenfold less
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test lint study figures bench clean

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

# full: about 100 minutes on two cores, goes on where it was interrupted; quick: two models, one seed
STUDY ?= full
STUDY_DATA_full := fig_plot/data
STUDY_DATA_quick := results/study/quick/data
STUDY_DATA := $(STUDY_DATA_$(STUDY))

study: $(READY)  ## the mini study: ladder of docstring LMs x docstring tasks x every script
	$(PYTHON) demo/study.py --scale $(STUDY)
	$(PYTHON) alignment_vis.py --results_dir results/study/$(STUDY)/seed0
	$(PYTHON) alignment_vis.py --results_dir results/study/$(STUDY)/seed0 --layer -1
	$(PYTHON) -m fig_plot.collect --results_dir results/study/$(STUDY) --output_dir $(STUDY_DATA)
	$(PYTHON) benchmarks/reproducibility.py --scores $(STUDY_DATA)/scores.csv --output $(STUDY_DATA)/reproducibility.csv
	$(PYTHON) -m fig_plot.verdict --data_dir $(STUDY_DATA)

figures: $(READY)  ## every committed figure from the committed CSV files
	$(PYTHON) -m fig_plot.verdict
	.venv/bin/jupyter execute fig_plot/Fig1.ipynb fig_plot/Fig2.ipynb fig_plot/Fig3.ipynb fig_plot/Fig4.ipynb \
	    fig_plot/Verdict.ipynb

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
