# Names for plain commands. Every target sets up what it needs; a second call reuses it.

PYTHON := .venv/bin/python
READY := .venv/.ready
SNAKEMAKE := .venv-snakemake/bin/snakemake
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)

.DEFAULT_GOAL := help
unexport PYTHONDONTWRITEBYTECODE  # without bytecode every start of a script compiles torch and transformers: 23 s, not 9
.PHONY: help demo test test-fast lint study figures bench clean

help:  ## the list of targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# Real LLMs: smollm2, 135M parameters, 93 MB to download; gemma3-270m, 268M parameters, 238 MB, with
# ACCEPT_GEMMA_TERMS=1 (https://ai.google.dev/gemma/terms). A few minutes each; any other --model_name works too.
MODEL ?= tiny
REAL_LLMS := smollm2 gemma3-270m
TRAIN := $(if $(filter $(REAL_LLMS),$(MODEL)),--max_samples 1000)
TEST := $(if $(filter $(REAL_LLMS),$(MODEL)),--max_samples 500)

demo: $(READY)  ## docstrings -> LM (MODEL=tiny, smollm2 or gemma3-270m) -> moments -> NTPS, with a table and a picture
	$(if $(filter $(REAL_LLMS),$(MODEL)),$(PYTHON) -m demo.real_llm $(MODEL) $(if $(ACCEPT_GEMMA_TERMS),--accept_gemma_terms))
	$(PYTHON) cache.py --model_name $(MODEL) --split train $(TRAIN)
	$(PYTHON) cache.py --model_name $(MODEL) --split test $(TEST)
	$(PYTHON) K_sweep.py --model_name $(MODEL)

test: lint $(SNAKEMAKE)  ## ruff, mypy, every test
	$(PYTHON) -m pytest -n 2 --dist worksteal

test-fast: lint  ## the same without the slow tests, while you work
	$(PYTHON) -m pytest -n 2 --dist worksteal -m "not slow"

lint: $(READY)  ## ruff, mypy, codespell
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy .
	.venv/bin/codespell

# docstrings: hours on two cores; quick: two models, six tasks, one seed; smollm2: a real LLM, a day;
# smollm2-docstrings: an hour and a half; paper: GPUs.
# Each goes on where it was interrupted, and has one seed of everything before the next
STUDY ?= docstrings
JOBS ?= 2
ifdef DATASETS_DIR
export NTPS_DATASETS_DIR := $(abspath $(DATASETS_DIR))
endif
STUDY_FLAGS ?=
STUDY_RUN = .venv-snakemake/bin/python -m snakemake -s runs/Snakefile --configfile runs/$(STUDY).yaml --cores $(JOBS) \
    --quiet rules --rerun-triggers mtime params --keep-going --rerun-incomplete $(STUDY_FLAGS)

study: $(READY) $(SNAKEMAKE)  ## models x datasets x every script: STUDY=docstrings, quick, smollm2, gemma3-270m, ...
	$(STUDY_RUN) first_seed; $(STUDY_RUN) collect

# the committed studies; your own: make figures TABLES=results/tables FIGURES=results/figures
TABLES ?= fig_plot/data
FIGURES ?= fig_plot/figures

figures: $(READY)  ## every study at or below TABLES, drawn into FIGURES
	$(PYTHON) -m fig_plot.findings --tables_dir "$(TABLES)"
	$(if $(filter fig_plot/data,$(TABLES)),$(PYTHON) -m fig_plot.findings.page)
	TABLES="$(TABLES)" FIGURES="$(FIGURES)" .venv/bin/jupyter execute fig_plot/Fig1.ipynb fig_plot/Fig2.ipynb fig_plot/Fig3.ipynb fig_plot/Fig4.ipynb \
	    fig_plot/Findings.ipynb

bench: $(READY)  ## speed of the pass, the solves, the probes and training, with random and docstring models
	$(PYTHON) -m benchmarks.bench_cache
	$(PYTHON) -m benchmarks.bench_k_sweep
	$(PYTHON) -m benchmarks.bench_training

clean:  ## remove the environments, results and caches
	rm -rf .venv .venv-snakemake .snakemake results demo/cache

# pip would compile every module of every package; one start of a script compiles the few that are ever used
$(READY): requirements.txt
	$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(BASE_PYTHON) -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(PYTHON) prescreen.py --help > /dev/null
	touch $(READY)

$(SNAKEMAKE): runs/requirements.txt
	$(BASE_PYTHON) -m venv .venv-snakemake
	.venv-snakemake/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r runs/requirements.txt
	touch $(SNAKEMAKE)
