"""Every script keeps one contract: it makes a result once, reuses it, refuses another, and makes it again if asked."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import alignment_vis
import cache
import from_scratch
import K_sweep
import linear_sklearn
import linear_training
import lora_finetuning
from tests.conftest import configure, flags, retrain, run_in_process, write_rows
from utils.data.load import load_texts
from utils.results import read_stored
from utils.script import UserError
from utils.settings import Data, Run

WORDS = ("colour=red,green,house", "size=small,large,engine", "rest=the,of")
STEPS = {"num_steps": 2, "steps_per_evaluation": 2, "batch_size": 4, "dtype": "float32"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A script with small settings."""

    module: ModuleType
    result: str  # pattern of its result
    work: str  # function of the script that a reused result does not need
    change: dict[str, Any]  # a setting that makes another result
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = (
    Case(cache, "moments/*/*/test.safetensors", "load_base_model", {"pooling": "last"}, {"split": "test"}),
    Case(K_sweep, "ntps/*/rows.json", "sweep_layer", {"num_null_draws": 3},
         {"num_null_draws": 2, "num_random_draws": 2, "picture": False}),
    Case(alignment_vis, "alignment/*/rows.layer0.json", "align", {"num_shuffles": 3},
         {"num_shuffles": 2, "words": WORDS}),
    Case(linear_sklearn, "linear_sklearn/*/rows.json", "probe_layers", {"inverse_penalty": 2.0},
         {"num_workers": 1, "picture": False}),
    Case(linear_training, "linear_training/*/rows/metrics.json", "find_states", {"learning_rate": 0.01},
         {"num_epochs": 2}),
    Case(lora_finetuning, "lora/*/rows/metrics.json", "build", {"rank": 4}, STEPS),
    Case(from_scratch, "from_scratch/*/rows/metrics.json", "build", {"learning_rate": 0.01}, STEPS),
)  # fmt: skip


@pytest.fixture(scope="module")
def moments(names, tmp_path_factory) -> dict[str, Any]:
    """The settings of all cases, and the moments of the training rows from which some of them start."""
    shared = names | {"device": "cpu", "results_dir": tmp_path_factory.mktemp("moments")}
    cache.main(configure(cache, **shared))
    return shared


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.module.__name__)
def made(request, moments, tmp_path_factory) -> tuple[Case, dict[str, Any]]:
    """A case and the settings of its result, which is made once; a picture that cannot be drawn loses no score."""

    def fail(*_):
        raise OSError("No space left on device")

    case, results = request.param, tmp_path_factory.mktemp("made") / "results"
    shutil.copytree(moments["results_dir"], results)
    settings = {**moments, "results_dir": results, **case.settings}
    if not hasattr(case.module, "save_figure"):
        run(case, settings)
        return case, settings
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(case.module, "save_figure", fail)
        run(case, settings, **({"picture": True} if "picture" in case.settings else {}))
    return case, settings


@pytest.fixture
def copied(made, tmp_path, monkeypatch) -> tuple[Case, dict[str, Any], Path]:
    """The same with a copy of the results of its own and without pictures, and the path of the result."""
    case, settings = made
    monkeypatch.setattr(case.module, "save_figure", lambda *_: None, raising=False)
    shutil.copytree(settings["results_dir"], tmp_path / "results")
    [path] = (tmp_path / "results").glob(case.result)
    return case, settings | {"results_dir": tmp_path / "results"}, path


def run(case: Case, settings: dict[str, Any], **more: Any) -> None:
    case.module.main(configure(case.module, **{**settings, **more}))


def forbid(monkeypatch, case: Case) -> None:
    """Makes it a mistake to begin the work."""
    monkeypatch.setattr(case.module, case.work, lambda *_, **__: pytest.fail("the work has begun"))


def test_a_result_is_made_with_its_provenance_and_nothing_half_written(copied):
    _, settings, path = copied
    content = read_stored(path)
    assert content["environment"]["packages"]["torch"] and content["config"]["seed"] == 0
    assert "results_dir" not in content["config"] and "device" not in content["config"]
    left = [file.name for file in settings["results_dir"].rglob("*") if file.suffix in (".tmp", ".lock", ".partial")]
    assert not left and not list(settings["results_dir"].rglob("*state*"))


def test_the_same_settings_reuse_it_also_from_a_copy_of_model_and_data(copied, monkeypatch, tmp_path):
    case, settings, path = copied
    before = path.read_bytes()
    forbid(monkeypatch, case)
    run(case, settings)
    model = shutil.copytree(settings["model_name"], tmp_path / "moved" / Path(settings["model_name"]).name)
    data = shutil.copy(settings["dataset_name"], tmp_path / "moved" / "rows.jsonl")
    run(case, settings, model_name=str(model), dataset_name=str(data), tokens_per_batch=64)
    assert path.read_bytes() == before
    with pytest.raises(pytest.fail.Exception, match="the work has begun"):
        run(case, settings, overwrite=True)


def test_another_setting_is_refused_by_its_name_and_made_with_overwrite(copied, monkeypatch):
    case, settings, path = copied
    [(name, value)] = case.change.items()
    before, stored = path.read_bytes(), read_stored(path)["config"][name]
    with monkeypatch.context() as patch:
        forbid(patch, case)
        with pytest.raises(UserError) as refused:
            run(case, settings, **case.change)
    message = str(refused.value)
    assert str(path) in message and f"{name}: {stored!r} there, {value!r} now" in message and "--overwrite" in message
    assert path.read_bytes() == before and message.count(" there, ") == 1
    run(case, settings, **case.change, overwrite=True)
    assert read_stored(path)["config"][name] == value


def other_rows(path: Path, change: str) -> list[dict]:
    """The rows of a file with the labels moved by one row, or with one other text in the test split."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if change == "labels":
        return [row | {"label": before["label"]} for row, before in zip(rows, rows[1:] + rows[:1], strict=True)]
    test, texts = load_texts(Data(str(path)), Run(), "test"), [row["text"] for row in rows]
    number = next(texts.index(text) for text in test.texts if texts.count(text) == 1)
    rows[number]["text"] += " house"
    return rows


@pytest.mark.parametrize("change", ["weights", "labels", "one test text"])
def test_other_weights_or_rows_under_the_same_name_are_refused(copied, monkeypatch, tmp_path, change):
    case, settings, path = copied
    before, words = path.read_bytes(), "with other weights of the model" if change == "weights" else "from other rows"
    if change == "weights":
        model = shutil.copytree(settings["model_name"], tmp_path / "other" / Path(settings["model_name"]).name)
        retrain(model)
        settings["model_name"] = str(model)
    elif case.module in (K_sweep, alignment_vis) and change == "one test text":
        pytest.skip("the moments of the train split do not depend on it")
    else:
        rows = other_rows(Path(settings["dataset_name"]), change)
        settings["dataset_name"] = str(write_rows(tmp_path / "rows.jsonl", rows))
    forbid(monkeypatch, case)
    with pytest.raises(UserError, match=words):
        run(case, settings)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["file", "x" * 300], ids=["a file", "a long name"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(made, names, name, tmp_path, monkeypatch):
    case, _ = made
    if case.module in (K_sweep, alignment_vis):
        pytest.skip("without moments there is no work")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("utils.models.load.load_weights", lambda *_, **__: pytest.fail("the work has begun"))
    options = flags(names | {"results_dir": tmp_path / name})
    message = run_in_process(monkeypatch, f"{case.module.__name__}.py", *options)
    assert message.startswith("error: cannot write") and "--results_dir" in message and len(message) < 500
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.module.__name__)
def test_what_no_setting_can_be_is_refused_by_the_command_line(case, monkeypatch, capsys):
    for wrong, words in (
        (("--max_samples", "0"), "--max_samples must be at least 1, not 0"),
        (("--max_length", "-3"), "--max_length must be at least 1, not -3"),
        (("--seed", "-1"), "--seed must be from 0 to 4294967295, not -1"),
        (("--dtype", "int8"), "dtype"),
        (("--no_such_flag",), "no_such_flag"),
    ):
        assert run_in_process(monkeypatch, f"{case.module.__name__}.py", *wrong) == 2
        assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("module", "change", "message"),
    [
        (K_sweep, {"fractions": (0.5, 1.5)}, r"--fractions must be in \(0, 1\]"),
        (K_sweep, {"device": "gpu9"}, "--device gpu9 cannot be used here"),
        (alignment_vis, {"layer": 3}, "no layer 3.* 0 to 2, or -3 to -1"),
        (alignment_vis, {"num_components": 3, "center": True}, "fewer than 3 positive .*smaller --num_components"),
        (linear_training, {"patience": 3}, "validation_share"),
        (linear_training, {"weight_decay": -1.0}, "--weight_decay must be at least 0"),
        (linear_training, {"validation_share": 0.999}, "--validation_share 0.999 leaves none of the 168 train texts"),
        (linear_training, {"track": "wandb"}, "pip install wandb"),
        (lora_finetuning, {"target_modules": ("query",)}, r"has no query\. Choose --target_modules among .*q_proj"),
        (lora_finetuning, {"start_layer": 2}, "has layers 0 to 1"),
        (lora_finetuning, {"warmup": -0.1}, "warmup must be in"),
        (lora_finetuning, {"dtype": "float16"}, "float16 does not train"),
    ],
)
def test_what_a_script_cannot_do_is_refused_in_one_sentence(moments, tmp_path, module, change, message):
    results = shutil.copytree(moments["results_dir"], tmp_path / "results")
    with pytest.raises((UserError, ValueError), match=message):
        module.main(configure(module, **moments | {"results_dir": results} | change))
    assert not list(results.rglob("*.json"))


def test_a_flag_is_compared_with_the_moments_even_if_it_gives_the_default(names, tmp_path, monkeypatch):
    shared = names | {"results_dir": tmp_path}
    cache.main(configure(cache, **shared, device="cpu", seed=1))
    assert run_in_process(monkeypatch, "K_sweep.py", *flags(shared), "--no_picture") == 0
    assert "(seed: 1 there, 0 now)" in str(run_in_process(monkeypatch, "K_sweep.py", *flags(shared), "--seed", "0"))
