#!/usr/bin/env bash
# Runs prescreen.py on the datasets of the studies, for its test in docs/scores.md; 1.5 hours on two cores.
#     NTPS_DATASETS_DIR=FOLDER bash runs/prescreen.sh            # all datasets
#     NTPS_DATASETS_DIR=FOLDER bash runs/prescreen.sh emotion    # these
# Needs python -m demo.real_llm smollm2, and gemma3-270m with --accept_gemma_terms. Copies each result to
# fig_plot/data/prescreen/, where python -m fig_plot.findings reads it, and skips a dataset with a result there.
set -euo pipefail
cd "$(dirname "$0")/.."
docstrings=(library kind returns raises private decorated parameters stdlib scipy torch sympy transformers)
real=(trec toxigen snli rotten_tomatoes emotion sst2 legacy-datasets/banking77 ucirvine/sms_spam
      marksverdhei/clickbait_title_classification common_sense climatebert/climate_sentiment ag_news wiki_toxic medical
      imdb)
[ $# -gt 0 ] || set -- "${real[@]}" "${docstrings[@]/#/docstrings/}"

mkdir -p fig_plot/data/prescreen
for dataset in "$@"; do
    name=${dataset//\//__}
    results=results/study/prescreen/$name kept=fig_plot/data/prescreen/$name.json
    models=(smollm2 gemma3-270m) options=()
    case $dataset in
        docstrings/*) models=(smollm2 tiny micro) ;;
        trec) options=(--label_column coarse_label) ;;
        toxigen) options=(--divide_train) ;;
    esac
    if [ ! -f "$kept" ]; then
        python prescreen.py --dataset_name "$dataset" --models "${models[@]}" "${options[@]}" --dtype bfloat16 \
            --max_samples 2000 --max_test_samples 1000 --max_length 160 --results_dir "$results"
        cp "$results/prescreen/$name.json" "$kept"
        rm -r "$results/prescreen/moments"
    fi
    echo "$kept"
done
