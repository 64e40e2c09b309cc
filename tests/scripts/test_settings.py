"""utils/settings.py: a config as flags, as one flat dictionary and back; names on disk; impossible values."""

import shlex
from pathlib import Path

import pytest

import alignment_vis
import cache
import from_scratch
import K_sweep
import linear_sklearn
import linear_training
import lora_finetuning
import prescreen
from demo import pretrain, random_twin
from fig_plot.findings import __main__ as findings
from tests.conftest import configure
from utils.script import parse
from utils.settings import Data, Model, command_line, expand, result_settings


def test_the_command_of_a_config_gives_that_config_and_names_only_what_differs_or_is_asked_for():
    """Values may hold spaces, quotes and braces: a shell splits the command into the same words."""
    values = {"model_name": 'it\'s {a} "model"', "adapter_dir": Path("my results/adapter"), "seed": 2**32 - 1}
    values |= {"text_template": "{a}\n$HOME `b` \u00e4", "fractions": (0.1, 1e-05, 1 / 3), "picture": False}
    config = configure(K_sweep, **values)
    python, script, *arguments = shlex.split(command_line("K_sweep.py", config))
    assert (python, script) == ("python", "K_sweep.py")
    assert parse(K_sweep.Config, arguments) == config
    short = configure(cache, model_name="me/mine", max_samples=5, overwrite=True)
    assert command_line("cache.py", short) == "python cache.py --model_name me/mine --max_samples 5 --overwrite"
    assert command_line("cache.py", short, {"max_samples"}) == "python cache.py --max_samples 5"


BROKEN = {  # rule -> settings that break it; the contract tests the seed of the other scripts
    "at least 1": [(cache, "num_folds", "0"), (pretrain, "batch_size", "0"), (findings, "num_draws", "-1")],
    "at least 0, below 3e38": [(module, "weight_decay", "-5") for module in (linear_training, from_scratch)],
    "positive, below 3e38": [(linear_sklearn, "inverse_penalty", "inf"), (lora_finetuning, "alpha", "nan"),
                             (linear_training, "learning_rate", "1e+300"), (pretrain, "learning_rate", "nan")],
    "from 0 to 4294967295": [(module, "seed", "4294967296") for module in (prescreen, pretrain, random_twin, findings)],
}  # fmt: skip
REFUSED = [(*case, f"--{case[1]} must be {rule}, not {case[2]}") for rule, cases in BROKEN.items() for case in cases]
REFUSED += [(cache, "layers", None, "--layers needs the number of a layer"),
            (prescreen, "models", None, "--models needs the name of a model"),
            (lora_finetuning, "adapter_dir", "old", "--adapter_dir has no use here")]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "value", "words"), REFUSED)
def test_impossible_values_are_refused(module, name, value, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(module.Config, [f"--{name}", *([value] if value else [])])
    assert stopped.value.code == 2 and words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["fold/", "./fold", "{here}/fold", "link"])
def test_one_folder_is_one_name_and_one_setting(name, tmp_path, monkeypatch):
    (tmp_path / "fold").mkdir()
    (tmp_path / "link").symlink_to("fold")
    monkeypatch.chdir(tmp_path)
    name = name.format(here=tmp_path)
    for kind, group in (("dataset_name", Data(name)), ("model_name", Model(name))):
        assert group.path_name == "fold" and result_settings(group)[kind] == str(tmp_path / "fold")


def test_the_home_folder_stands_for_its_sign_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"results_dir": Path("~/x"), "datasets_dir": Path("~/y"), "adapter_dir": Path("~/a"), "words": ("~a=b,c",)}
    config = configure(alignment_vis, **values, model_name="~/m", dataset_name="~/rows.csv")
    expand(config)  # as `parse` does it
    assert (config.run.results_dir, config.run.datasets_dir) == (tmp_path / "x", tmp_path / "y")
    assert (config.model.model_name, config.data.dataset_name) == (f"{tmp_path}/m", f"{tmp_path}/rows.csv")
    assert config.model.adapter_dir == tmp_path / "a" and config.words == ("~a=b,c",)


def test_names_that_every_training_gives_are_made_distinct(tmp_path):
    for own in ("checkpoint-500", "model.gguf"):
        for run in ("run1", "run2", "run2/checkpoint-3"):
            path = tmp_path / run / own
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if path.suffix else path.mkdir()
            assert Model(str(path)).path_name == f"{run.replace('/', '__')}__{own.removesuffix('.gguf')}"


def test_a_line_break_in_a_template_is_one():
    config = parse(cache.Config, ["--text_template", r"{a}\n{b}\t{c}"])
    assert config.data.text_template == "{a}\n{b}\t{c}" and len(config.data.text_template) == 11
