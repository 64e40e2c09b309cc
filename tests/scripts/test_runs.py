"""runs/: each study is what its yaml file says, and Snakemake runs it, whatever fails on the way."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml

import cache
import linear_training
from runs.grid import Grid, folder_name, to_flags
from tests.conftest import ROOT
from utils.data.docstrings import TASKS
from utils.data.table import DATASETS, PAPER_KEYS
from utils.models.table import MODELS
from utils.script import parse
from utils.settings import path_name

SNAKEMAKE = ROOT / ".venv-snakemake" / "bin" / "snakemake"
STUDIES = sorted(path.stem for path in (ROOT / "runs").glob("*.yaml"))
needs_snakemake = pytest.mark.skipif(not SNAKEMAKE.is_file(), reason="make .venv-snakemake/bin/snakemake installs it")


def grid(study: str) -> Grid:
    return Grid(yaml.safe_load((ROOT / "runs" / f"{study}.yaml").read_text()))


def snakemake(configfile: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [
        SNAKEMAKE.with_name("python"),
        "-m",
        "snakemake",
        "-s",
        "runs/Snakefile",
        "--configfile",
        configfile,
        "--cores",
        "2",
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


# ------------------------------------------------------------------ the plans
@pytest.mark.parametrize("study", STUDIES)
def test_every_name_of_a_study_is_known_and_every_cell_has_its_own_files(study):
    found = grid(study)
    for name in found.config["models"]:
        assert name in MODELS or "by" in found.config["models"][name], name
    for name in found.config["datasets"]:
        kind, _, task = name.partition("/")
        assert name in DATASETS or (kind == "docstrings" and task in TASKS) or name in ("trec", "ag_news"), name
        assert folder_name(name) == path_name(name)
    targets = found.targets()
    assert len(set(targets)) == len(targets) and set(found.targets(first_seed=True)) <= set(targets)
    assert not [path for path in targets if not path.startswith(f"results/study/{study}/seed")]


def test_the_papers_grid_is_eight_models_by_its_twelve_datasets():
    found = grid("paper")
    assert list(found.datasets.values()) == list(PAPER_KEYS)
    assert len(found.models) == 8 and set(found.models.values()) < set(MODELS)
    cells = {tuple(path.split("/")[-3:-1]) for path in found.targets() if "/seed0/lora/" in path}
    assert len(cells) == 96


def test_what_is_trained_has_the_probes_its_gain_is_measured_from():
    for study in STUDIES:
        targets = set(grid(study).targets())
        for path in targets:
            if "/lora/" in path:
                place, cell = path.rsplit("/lora/", 1)
                model, dataset, _ = cell.split("/")
                assert f"{place}/linear_training/{model}/{dataset}/metrics.json" in targets
                assert f"{place}/linear_sklearn/{model}/{dataset}.json" in targets


def test_quick_is_a_part_of_the_docstring_study():
    of = {study: {path.split("/", 3)[3] for path in grid(study).targets()} for study in ("quick", "docstrings")}
    assert of["quick"] < of["docstrings"]


def test_settings_become_the_flags_a_script_takes():
    flags = {"standardize": True, "learning_rate": 1e-3, "model_name": "tiny", "dataset_name": "a b.jsonl"}
    config = parse(linear_training.Config, shlex.split(to_flags(flags)))
    assert config.standardize and config.learning_rate == 1e-3 and config.data.dataset_name == "a b.jsonl"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"only": {"lora": ["imbd"]}}, "'imbd'"),
        ({"models": {"tiny": {"seeds": {"lorra": 1}}}}, "'lorra'"),
        ({"dataset": ["emotion"]}, "'dataset'"),
        ({"datasets": [], "only": {}}, "no datasets"),
        ({"dataset_flags": {"trecc": {"label_column": "fine_label"}}}, "'trecc', in `dataset_flags`"),
    ],
)
def test_a_misspelt_study_ends_in_one_sentence(wrong, message):
    with pytest.raises(SystemExit, match=message):
        Grid({**grid("quick").config, **wrong})


def test_a_dataset_has_flags_of_its_own():
    study = grid("smollm2")
    of_trec, of_emotion, of_toxigen = (
        study.flags("cache", SimpleNamespace(seed="0", model="smollm2", dataset=dataset))
        for dataset in ("trec", "emotion", "toxigen")
    )
    assert "--label_column coarse_label" in of_trec and "--label_column" not in of_emotion
    assert parse(cache.Config, shlex.split(of_toxigen)).data.divide_train


def test_another_attempt_has_twice_the_memory_and_the_time():
    found = grid("paper").resources("lora")
    of_8b = SimpleNamespace(model="meta-llama__Meta-Llama-3-8B")
    first, second = ({name: found[name](of_8b, n) for name in ("mem_mb", "runtime")} for n in (1, 2))
    assert {name: 2 * value for name, value in first.items()} == second
    assert first["mem_mb"] > 2 * 8e9 / 1e6  # its weights in bfloat16 at least


@pytest.mark.parametrize("study, name", [(of, name) for of in ("paper", "smollm2") for name in grid(of).models])
def test_a_cell_asks_for_what_cache_says_that_it_needs(study, name):
    """In main memory, in float32: with what the libraries take on top, and not much more."""
    of_study = grid(study)
    spec = of_study.config["models"][of_study.models[name]]
    num_folds, meta = [1] * spec["num_layers"] + [5], torch.device("meta")  # the last layer keeps its folds
    sums = [cache.LayerSums((spec["hidden_size"], 77, folds), meta, "float32").tensors() for folds in num_folds]
    need = (4 * float(spec["parameters"]) + sum(value.nbytes for of in sums for value in of.values())) / 1e6
    assert need < of_study.memory("cache", name) < 1500 + 1.1 * need


# ------------------------------------------------------------------ Snakemake
@needs_snakemake
@pytest.mark.slow
def test_the_whole_paper_grid_can_be_planned():
    """By the plain command, and by the words of `make study STUDY=paper`."""
    plain = ["-s", "runs/Snakefile", "--configfile", "runs/paper.yaml", "-n", "--cores", "2"]
    planned = subprocess.run(
        [SNAKEMAKE, *plain, "--config", "results_dir=nowhere"], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    command = ["make", "--dry-run", "study", "STUDY=paper"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ")
    calls = [shlex.split(call) for call in re.findall(r"\S+ -m snakemake [^;\n]*", made)]
    assert [call[-1] for call in calls] == ["first_seed", "collect"]
    assert all(call[3:7] == ["-s", "runs/Snakefile", "--configfile", "runs/paper.yaml"] for call in calls)
    assert planned.returncode == 0, planned.stderr
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", planned.stdout, flags=re.MULTILINE))
    assert {name: int(jobs[name]) for name in ("cache", "K_sweep", "lora", "cache_after", "before_after")} == {
        "cache": 8 * 12 * 2,
        "K_sweep": 8 * 12 * 4,
        "lora": 8 * 12,
        "cache_after": 8 * 12 * 2,
        "before_after": 8 * 12,
    }


@pytest.fixture(scope="module")
def study(model_dirs, rows_path, tmp_path_factory) -> tuple[Path, dict, subprocess.CompletedProcess]:
    """A study of a random model and of one that cannot be made: its folder, its settings, what was said."""
    folder = tmp_path_factory.mktemp("study")
    training = {"batch_size": 4, "num_steps": 2, "steps_per_evaluation": 2, "dtype": "float32"}
    seeds = {"closed_form": 1, "probe": 1, "lora": 1, "ntps_after": 1}
    config = {
        "study": "toy",
        "results_dir": str(folder),
        "flags": {"max_samples": 60, "max_length": 32},
        "scripts": {"linear_training": {"num_epochs": 2}, "lora": training},
        "controls": {"largest": {}, "random": {"subspace": "random"}},
        "controls_after": ["largest"],
        "models": {
            str(model_dirs["qwen2"]): {"seeds": seeds},
            "no-model": {"seeds": seeds, "by": "echo 'error: there is no such model'; false"},
        },
        "datasets": [str(rows_path)],
        "after": [f"python -m fig_plot.collect --results_dir {folder}/study/toy --output_dir {folder}/data"],
    }
    (folder / "toy.json").write_text(json.dumps(config))
    return folder, config, snakemake(folder / "toy.json", "--keep-going", "--rerun-triggers", "mtime", "params")


@needs_snakemake
@pytest.mark.slow
def test_odd_file_names_and_a_single_control_can_be_planned(tmp_path):
    """A blank and braces in the names of the data and of the folder of results; V by largest eigenvalues alone."""
    rows = tmp_path / "my {odd} rows.jsonl"
    rows.touch()
    config = {"study": "odd", "results_dir": str(tmp_path / "a folder"), "controls": {"largest": {}},
              "models": {"tiny": {"seeds": {"closed_form": 1}}}, "datasets": [str(rows)]}  # fmt: skip
    (tmp_path / "odd.json").write_text(json.dumps(config))
    planned = snakemake(tmp_path / "odd.json", "--dry-run", "--printshellcmds")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    [command] = [line for line in planned.stdout.splitlines() if "K_sweep.py" in line]
    words = shlex.split(command.split(">")[0])
    assert words[words.index("--dataset_name") + 1] == str(rows) and path_name(str(rows)) == "my (odd) rows"
    assert "my (odd) rows.json" in planned.stdout and folder_name(str(rows)) == "my (odd) rows"


@needs_snakemake
@pytest.mark.slow
def test_a_failed_cell_is_tried_twice_and_stops_no_other(study):
    folder, config, ran = study
    assert ran.returncode != 0
    wanted = [path for path in Grid(config).targets() if "no-model" not in path]
    assert len(wanted) == 6 and not [path for path in wanted if not Path(path).is_file()]
    assert not [path for path in Grid(config).targets() if "no-model" in path and Path(path).is_file()]
    assert (folder / "study" / "toy" / "logs" / "model-no-model.log").read_text() == "error: there is no such model\n"
    assert "Trying to restart job" in ran.stderr
    # the tables are made of what is done
    assert set(pd.read_csv(folder / "data" / "training.csv")["dataset"]) == {"rows"}


@needs_snakemake
@pytest.mark.slow
def test_moments_are_gone_when_all_that_reads_them_is_done(study):
    folder, *_ = study
    assert not list(folder.rglob("*.safetensors.*")) and not list((folder / "study").rglob("moments/*/rows/*"))
    table = json.loads(next(folder.rglob("before_after.json")).read_text())
    scores = {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("ntps/*/rows.json")}
    [name] = [name for name in scores if not name.endswith("+lora")]
    assert table["probe_settings"]["num_epochs"] == 2
    expected = [scores[key]["score"]["retained"]["value"] for key in (name, f"{name}+lora")]
    assert [table["ntps"]["retained"][key]["value"] for key in ("before", "after")] == expected


@needs_snakemake
@pytest.mark.slow
def test_a_finished_study_runs_nothing_again(study):
    folder, config, _ = study
    config = {**config, "models": {name: spec for name, spec in config["models"].items() if name != "no-model"}}
    (folder / "again.json").write_text(json.dumps(config))

    def planned() -> dict[str, str]:
        shown = snakemake(folder / "again.json", "--dry-run", "--rerun-triggers", "mtime", "params").stdout
        return dict(re.findall(r"^(\w+) +(\d+)$", shown, flags=re.MULTILINE))

    assert planned() == {"collect": "1", "total": "1"}
    next(folder.rglob("rows.random.json")).unlink()  # its moments are made again, and no other result for their sake
    assert planned() == {"cache": "2", "K_sweep": "1", "collect": "1", "total": "4"}
