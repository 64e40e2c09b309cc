# Names for plain commands. Every target sets up what it needs; a second call reuses it.

PYTHON := .venv/bin/python
READY := .venv/.ready
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint study figures bench clean

help:  ## what can be made here
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# smollm2: a real LLM of 135M parameters, a few minutes and 93 MB to download; any other --model_name too
MODEL ?= tiny
TRAIN_smollm2 := --max_samples 1000
TEST_smollm2 := --max_samples 500

demo: $(READY)  ## docstrings -> LM (MODEL=tiny or smollm2) -> moments -> NTPS, with a table and a picture
	$(if $(filter smollm2,$(MODEL)),$(PYTHON) -m demo.smollm2)
	$(PYTHON) cache.py --model_name $(MODEL) --split train $(TRAIN_$(MODEL))
	$(PYTHON) cache.py --model_name $(MODEL) --split test $(TEST_$(MODEL))
	$(PYTHON) K_sweep.py --model_name $(MODEL)

test: lint  ## ruff, mypy, every test
	$(PYTHON) -m pytest -n 2

test-fast: lint  ## the same without the slow tests, while you work
	$(PYTHON) -m pytest -n 2 -m "not slow"

lint: $(READY)  ## ruff, mypy, codespell
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy .
	.venv/bin/codespell

# full: about 100 minutes on two cores, goes on where it was interrupted; quick: two models, one seed
STUDY ?= full
STUDY_DATA_full := fig_plot/data
STUDY_DATA_quick := results/study/quick/data
STUDY_DATA := $(STUDY_DATA_$(STUDY))

study: $(READY)  ## the mini study: ladder of docstring LMs x docstring tasks x every script
	$(PYTHON) -m demo.study --scale $(STUDY)
	$(PYTHON) alignment_vis.py --results_dir results/study/$(STUDY)/seed0
	$(PYTHON) alignment_vis.py --results_dir results/study/$(STUDY)/seed0 --layer -1
	$(PYTHON) -m fig_plot.collect --results_dir results/study/$(STUDY) --output_dir $(STUDY_DATA)
	$(PYTHON) -m benchmarks.reproducibility --scores $(STUDY_DATA)/scores.csv --output $(STUDY_DATA)/reproducibility.csv
	$(PYTHON) -m fig_plot.findings --data_dir $(STUDY_DATA)

figures: $(READY)  ## every committed figure from the committed CSV files
	$(PYTHON) -m fig_plot.findings
	.venv/bin/jupyter execute fig_plot/Fig1.ipynb fig_plot/Fig2.ipynb fig_plot/Fig3.ipynb fig_plot/Fig4.ipynb \
	    fig_plot/Findings.ipynb

bench: $(READY)  ## every performance claim of the README, measured here
	$(PYTHON) -m benchmarks.bench_cache
	$(PYTHON) -m benchmarks.bench_k_sweep
	$(PYTHON) -m benchmarks.bench_sklearn
	$(PYTHON) -m benchmarks.bench_linear_training
	$(PYTHON) -m benchmarks.bench_training

clean:  ## remove the environment, results and caches
	rm -rf .venv results demo/cache

$(READY): requirements.txt
	$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(BASE_PYTHON) -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(READY)
