"""runs/: each study follows its yaml file, and Snakemake runs it to the end despite failures."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

import cache
import linear_training
import prescreen
from runs.grid import Grid, folder_name, to_flags
from tests.conftest import ROOT, only_result
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
    """The plain command, from the top folder."""
    command = [SNAKEMAKE, "-s", "runs/Snakefile", "--configfile", configfile, "--cores", "2", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


def num_jobs(done: subprocess.CompletedProcess) -> dict[str, int]:
    """The number of jobs that Snakemake plans, by rule."""
    found = re.findall(r"^(\w+) +(\d+)$", done.stdout, flags=re.MULTILINE)
    return {name: int(number) for name, number in found}


@pytest.mark.parametrize("study", STUDIES)
def test_every_name_of_a_study_is_known_and_every_cell_has_its_own_files(study):
    found = grid(study)
    for name in found.config["models"]:
        assert name in MODELS or "by" in found.config["models"][name], name
    for name in found.config["datasets"]:
        kind, _, task = name.partition("/")
        assert name in DATASETS or (kind == "docstrings" and task in TASKS) or name in ("trec", "ag_news"), name
        assert folder_name(name) == path_name(name)
    assert (folder_name("out/run/checkpoint-5"), folder_name("out/in/texts:de")) == ("run__checkpoint-5", "texts__de")
    targets = found.targets()
    assert len(set(targets)) == len(targets) and set(found.targets(first_seed=True)) <= set(targets)
    assert not [path for path in targets if not path.startswith(f"results/study/{study}/seed")]

    for path in targets:  # LoRA comes with the probes that its gain is measured from
        if "/lora/" in path:
            place, cell = path.rsplit("/lora/", 1)
            model, dataset, _ = cell.split("/")
            assert f"{place}/linear_training/{model}/{dataset}/metrics.json" in targets
            assert f"{place}/linear_sklearn/{model}/{dataset}.json" in targets


def test_the_papers_grid_is_eight_models_by_its_twelve_datasets_and_quick_a_part_of_the_docstring_study():
    found = grid("paper")
    assert list(found.datasets.values()) == list(PAPER_KEYS)
    assert len(found.models) == 8 and set(found.models.values()) < set(MODELS)
    cells = {tuple(path.split("/")[-3:-1]) for path in found.targets() if "/seed0/lora/" in path}
    assert len(cells) == 96
    quick, docstrings = ({path.split("/", 3)[3] for path in grid(of).targets()} for of in ("quick", "docstrings"))
    assert quick < docstrings


def test_settings_become_the_flags_a_script_takes_and_a_dataset_has_flags_of_its_own():
    flags = {"standardize": True, "learning_rate": 1e-3, "model_name": "tiny", "dataset_name": "a b.jsonl"}
    config = parse(linear_training.Config, shlex.split(to_flags(flags)))
    assert config.standardize and config.learning_rate == 1e-3 and config.data.dataset_name == "a b.jsonl"
    of_trec, of_emotion, of_toxigen = (
        grid("smollm2").flags("cache", SimpleNamespace(seed="0", model="smollm2", dataset=dataset))
        for dataset in ("trec", "emotion", "toxigen")
    )
    assert "--label_column coarse_label" in of_trec and "--label_column" not in of_emotion
    assert parse(cache.Config, shlex.split(of_toxigen)).data.divide_train


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


def test_another_attempt_has_twice_the_memory_and_the_time():
    found = grid("paper").resources("lora")
    first, second = ({name: found[name](None, n) for name in ("mem_mb", "runtime")} for n in (1, 2))
    assert first == {"mem_mb": 98000, "runtime": 240} and second == {"mem_mb": 196000, "runtime": 480}
    assert found["gpu"] == 1 and grid("quick").resources("cache")["mem_mb"](None, 1) == 4000


def test_the_test_of_prescreen_screens_every_dataset_of_the_studies_once(tmp_path):
    """A stand-in for python records its arguments and writes an empty result; a second run finds all results."""
    stand_in, script = tmp_path / "python", shutil.copytree(ROOT / "runs", tmp_path / "runs") / "prescreen.sh"
    stand_in.write_text('#!/bin/bash\necho "${*:2}" >> calls\nmkdir -p "${*: -1}/prescreen/moments"\n'
                        'touch "${*: -1}/prescreen/$(basename "${*: -1}").json"\n')  # fmt: skip
    stand_in.chmod(0o755)
    for _ in range(2):
        subprocess.run(["bash", script], env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True)
    calls = [parse(prescreen.Config, line.split()) for line in (tmp_path / "calls").read_text().splitlines()]
    names = sorted(call.data.dataset_name for call in calls)
    assert names == sorted([*grid("smollm2").datasets.values(), *grid("docstrings").config["only"]["lora"]])
    found = {path.stem for path in (tmp_path / "fig_plot" / "data" / "prescreen").iterdir()}
    assert found == set(map(path_name, names)) and not list(tmp_path.rglob("moments"))


@needs_snakemake
@pytest.mark.slow
def test_the_whole_paper_grid_can_be_planned_and_make_study_says_the_same():
    planned = snakemake(Path("runs/paper.yaml"), "-n", "--config", "results_dir=nowhere")
    assert planned.returncode == 0, planned.stderr
    cells, jobs = 8 * 12, num_jobs(planned)
    assert {name: jobs[name] for name in ("cache", "K_sweep", "lora", "cache_after", "before_after")} == {
        "cache": 2 * cells, "K_sweep": 4 * cells, "lora": cells, "cache_after": 2 * cells, "before_after": cells
    }  # fmt: skip
    command = ["make", "--dry-run", "study", "STUDY=paper"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ")
    calls = [shlex.split(call) for call in re.findall(r"\S+ -m snakemake [^;\n]*", made)]
    assert [call[-1] for call in calls] == ["first_seed", "collect"]
    assert all(call[3:7] == ["-s", "runs/Snakefile", "--configfile", "runs/paper.yaml"] for call in calls)


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
def test_a_study_goes_on_after_a_failed_cell_removes_its_moments_and_runs_nothing_twice(names, tmp_path):
    """A study of a random model and of one that cannot be made."""
    training = {"batch_size": 4, "num_steps": 2, "steps_per_evaluation": 2, "dtype": "float32"}
    seeds = {"closed_form": 1, "probe": 1, "lora": 1, "ntps_after": 1}
    failing = {"seeds": seeds, "by": "echo 'error: there is no such model'; false"}
    results, data = tmp_path / "study" / "toy", tmp_path / "data"
    config = {
        "study": "toy", "results_dir": str(tmp_path), "controls": {"largest": {}},
        "flags": {"max_samples": 60, "max_length": 32},
        "scripts": {"linear_training": {"num_epochs": 2}, "lora": training},
        "models": {names["model_name"]: {"seeds": seeds}, "no-model": failing}, "datasets": [names["dataset_name"]],
        "after": [f"python -m fig_plot.collect --results_dir {results} --output_dir {data}"],
    }  # fmt: skip
    (tmp_path / "toy.json").write_text(json.dumps(config))
    options = ("--rerun-triggers", "mtime", "params")
    ran = snakemake(tmp_path / "toy.json", "--keep-going", *options)
    assert ran.returncode != 0 and "Trying to restart job" in ran.stderr
    done = [path for path in Grid(config).targets() if Path(path).is_file()]
    assert done == [path for path in Grid(config).targets() if "no-model" not in path] and len(done) == 5
    assert (results / "logs" / "model-no-model.log").read_text() == "error: there is no such model\n"
    assert set(pd.read_csv(data / "training.csv")["dataset"]) == {"rows"}
    # moments are removed after every job that reads them
    assert not list(results.rglob("*.safetensors.*")) and not list(results.rglob("moments/*/rows/*"))
    _, table = only_result(results, "**/before_after.json")
    scores = {path.parent.name: json.loads(path.read_text()) for path in results.rglob("ntps/*/rows.json")}
    [name] = [name for name in scores if not name.endswith("+lora")]
    assert table["probe_settings"]["num_epochs"] == 2
    expected = [scores[key]["score"]["retained"]["value"] for key in (name, f"{name}+lora")]
    assert [table["ntps"]["retained"][key]["value"] for key in ("before", "after")] == expected
    # a finished study runs nothing again
    del config["models"]["no-model"]
    (tmp_path / "again.json").write_text(json.dumps(config))
    assert num_jobs(snakemake(tmp_path / "again.json", "--dry-run", *options)) == {"collect": 1, "total": 1}
    # its moments are made again, and no other result for their sake
    next(path for path in results.rglob("ntps/*/rows.json") if "+lora" not in str(path)).unlink()
    again = num_jobs(snakemake(tmp_path / "again.json", "--dry-run", *options))
    assert again == {"cache": 2, "K_sweep": 1, "collect": 1, "total": 4}
