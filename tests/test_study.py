"""demo/study.py: its plan can be carried out, and a cell that fails takes only those with it that need it."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest

from demo import study
from demo.docstrings import TASKS
from demo.study import Cell
from utils.io import UserError, parse, run_script

pytestmark = pytest.mark.slow

# the scripts are imported where they are used: the workers import this module, and should start quickly
FULL, QUICK = (study.plan(study.Config(scale=scale)) for scale in ("full", "quick"))


# ------------------------------------------------------------------ the plan
@pytest.mark.parametrize("cells", [FULL, QUICK], ids=["full", "quick"])
def test_what_a_cell_needs_comes_before_it(cells):
    place = {cell.name: index for index, cell in enumerate(cells)}
    assert len(place) == len(cells)  # unique names: logs and results do not overwrite each other
    for cell in cells:
        assert all(place[need] < place[cell.name] for need in cell.needs), cell.name


def test_the_full_study_is_large_enough_for_its_questions():
    assert len(study.TRAINED_TASKS) >= 12 and set(study.TRAINED_TASKS) <= set(study.PROBED_TASKS) <= set(TASKS)
    names = {cell.name for cell in FULL}
    for task in study.TRAINED_TASKS:  # whatever is trained has the probe that its gain is measured from
        for seed in (0, 1):
            assert {f"{kind}-tiny-{task}-seed{seed}" for kind in ("closed-form", "probe", "lora")} <= names
        assert {f"{kind}-tiny-{task}-seed0" for kind in ("full_finetuning", "from_scratch")} <= names
    assert not any(name.startswith(("lora-tiny-random", "full_finetuning-tiny-random")) for name in names)


def test_quick_is_a_part_of_full():
    assert {cell.name for cell in QUICK} < {cell.name for cell in FULL}
    assert len(QUICK) < len(FULL) / 2
    assert {cell.name.rsplit("seed")[-1] for cell in QUICK if "seed" in cell.name} == {"0"}


def test_cells_write_to_a_folder_of_their_scale_and_seed():
    for scale, cells in (("full", FULL), ("quick", QUICK)):
        for cell in cells:
            settings = next((value for value in cell.run.args if isinstance(value, dict)), None)
            if settings is not None:
                assert settings["results_dir"] == Path(f"results/study/{scale}/seed{settings['seed']}")
                assert settings["dataset_name"].removeprefix("docstrings/") in TASKS
                assert settings["max_samples"] == study.MAX_SAMPLES


@pytest.mark.parametrize("rung", study.LADDER, ids=lambda rung: Path(rung.name).name)
def test_the_ladder_is_pretrained_to_where_its_cells_look(rung):
    from demo import pretrain

    config = parse(pretrain.Config, [*rung.pretraining])
    if rung.name.startswith("demo/"):
        assert pretrain.output_folder(config) == Path(rung.name)
    elif rung.pretraining:
        assert config.size == rung.name


def test_finetuning_of_each_kind_makes_the_run_it_names(monkeypatch, tmp_path):
    import from_scratch
    import lora_finetuning

    calls = []
    for script in (lora_finetuning, from_scratch):
        monkeypatch.setattr(script, "main", lambda config, script=script: calls.append((script, config)))
    for kind in ("lora", "full_finetuning", "from_scratch"):
        for seed in (0, 1):
            place = {"model_name": "tiny", "dataset_name": "docstrings/kind", "seed": seed, "results_dir": tmp_path}
            study.finetune(kind, place)
    (lora, config), (_, again), (full, pretrained), _, (scratch, random), _ = calls
    assert (lora, full, scratch) == (lora_finetuning, from_scratch, from_scratch)
    assert config.output.ntps_after and not again.output.ntps_after
    assert (pretrained.init, random.init) == ("pretrained", "random")
    for made, kind in ((config, "lora"), (pretrained, "full_finetuning"), (random, "from_scratch")):
        assert made.training.num_steps == study.NUM_STEPS[kind]


# ------------------------------------------------------------------ running cells; the functions run in the workers
def write(path: Path) -> None:
    print(f"writing {path.name}")
    path.write_text("written")


def copy(source: Path, path: Path) -> None:
    path.write_text(source.read_text())


def make_a_mistake() -> None:
    raise UserError("There is no such model. Run: python cache.py")


def break_down() -> None:
    raise ValueError("an odd shape")


def toy_cells(folder: Path) -> list[Cell]:
    """In an order in which two must wait."""
    return [
        Cell("last", partial(write, folder / "last"), ("after-mistaken",)),
        Cell("copied", partial(copy, folder / "fine", folder / "copied"), ("fine",)),
        Cell("mistaken", partial(make_a_mistake)),
        Cell("broken", partial(break_down)),
        Cell("after-mistaken", partial(write, folder / "after-mistaken"), ("fine", "mistaken")),
        Cell("after-broken", partial(write, folder / "after-broken"), ("broken",)),
        Cell("fine", partial(write, folder / "fine")),
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, dict[str, str | None]]:
    """Toy cells run by two workers: their folder and what `run_cells` says of them."""
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        return folder, study.run_cells(toy_cells(folder), 2, folder / "logs")


def test_a_failed_cell_takes_only_those_that_need_it(ran):
    folder, done = ran
    assert done == {
        "fine": None,
        "copied": None,
        "mistaken": "There is no such model. Run: python cache.py",
        "broken": "ValueError: an odd shape",
        "after-mistaken": "needs mistaken",
        "after-broken": "needs broken",
        "last": "needs after-mistaken",
    }
    assert {path.name for path in folder.iterdir()} == {"fine", "copied", "logs"}
    assert (folder / "copied").read_text() == "written"


def test_logs_hold_what_a_cell_printed_and_the_traceback_of_a_defect(ran):
    logs = {path.stem: path.read_text() for path in (ran[0] / "logs").iterdir()}
    assert set(logs) == {"fine", "copied", "mistaken", "broken"}
    assert logs["fine"] == "writing fine\n"
    assert "Traceback" in logs["broken"] and "in break_down" in logs["broken"]
    assert "Traceback" not in logs["mistaken"]


def test_failed_cells_are_named_and_the_exit_code_is_1(ran, monkeypatch, tmp_path, capsys):
    _, done = ran
    monkeypatch.setattr(study, "run_cells", lambda cells, num_workers, logs: done)
    monkeypatch.setattr(sys, "argv", ["study.py", "--scale", "quick", "--results_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        run_script(study.main, study.Config, study.__doc__)
    message = str(stopped.value.code)  # Python prints a message that is no number, and exits with 1
    assert message.startswith(f"error: 5 of 7 cells failed, see {tmp_path / 'quick' / 'logs'}:")
    assert "\n  broken: ValueError: an odd shape" in message and "\n  last: needs after-mistaken" in message
    assert "fine: " not in message and not capsys.readouterr().out


def test_a_killed_worker_ends_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "plan", lambda config: [Cell("killed", partial(os._exit, 9))])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(UserError, match="finished cells are kept"):
        study.main(study.Config(results_dir=tmp_path, num_workers=1))


def test_a_finished_study_names_its_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "run_cells", lambda cells, num_workers, logs: {cell.name: None for cell in cells})
    study.main(study.Config(results_dir=tmp_path))
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "full")
