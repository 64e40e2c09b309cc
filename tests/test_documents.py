"""The README and the Makefile: what they name exists, and what they tell a user to type works."""

import dataclasses
import inspect
import re
import shlex
import subprocess
import sys

import pandas as pd
import pytest
import tyro

from tests.conftest import ROOT, run_command
from utils.datasets_table import SPECS
from utils.models import MODELS

README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"^ {4}(python \S+\.py.*?)(?: +#.*)?$", README, flags=re.MULTILINE)))
SCRIPTS = sorted({path.name for path in ROOT.glob("*.py")})


def makefile_commands(target: str) -> list[list[str]]:
    """The python commands of a target, as `make` would run them."""
    printed = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [shlex.split(line)[1:] for line in printed.splitlines() if re.match(r"\S*python \S+\.py", line)]


def test_every_file_the_readme_names_exists():
    named = set(re.findall(r"\b((?:[\w-]+/)*[\w-]+\.(?:py|txt|toml|ipynb|mplstyle))\b", README))
    assert {"cache.py", "K_sweep.py", "demo/pretrain.py"} <= named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_every_script_stands_in_the_readme():
    assert not [script for script in SCRIPTS if f"`{script}`" not in README and f"    {script}" not in README]


def test_tables_name_every_dataset_and_model():
    assert not [spec.key for spec in SPECS if f"`{spec.key}`" not in README]
    for name in MODELS:
        assert f"`{name}`" in README or f"`-{name.split('-', 1)[1]}`" in README, name


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_parse(command):
    """Every flag exists: the command is parsed by its script's own Config."""
    script, *arguments = shlex.split(command)[1:]
    module = __import__(script.removesuffix(".py").replace("/", "."), fromlist=["Config"])
    if hasattr(module, "Config"):
        tyro.cli(module.Config, args=arguments)
    else:
        assert not arguments


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_field(script):
    module = __import__(script.removesuffix(".py"))
    shown = run_command(script, "--help")
    assert shown.returncode == 0
    classes = [of for of in module.Config.__mro__ if dataclasses.is_dataclass(of)]
    source = "".join(map(inspect.getsource, classes))
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name}".replace("_", "-") in shown.stdout.replace("_", "-")
        assert re.search(rf"^    {field.name}: .*#", source, flags=re.MULTILINE), f"{field.name} has no comment"


def test_make_demo_ends_with_the_readme_numbers(tmp_path):
    """The commands of `make demo`, and the table the README shows, where this machine has the same docstrings."""
    commands = makefile_commands("demo")
    assert [command[0] for command in commands] == ["cache.py", "cache.py", "K_sweep.py"]
    for command in commands:
        result = run_command(*command, "--results_dir", tmp_path)
        assert result.returncode == 0, result.stderr
    path = tmp_path / "ntps" / "tiny" / "docstrings__library.json"
    assert result.stdout.strip().splitlines()[-1] == str(path)
    assert path.with_suffix(".png").is_file()
    for name, value in re.findall(r"^ {6}(ntps\w*|retained) +(0\.\d{4})", README, flags=re.MULTILINE):
        shown = re.search(rf"^  {name} +(0\.\d{{4}})", result.stdout, flags=re.MULTILINE)
        same_rows = sys.version_info[:3] == (3, 11, 7)  # the standard library's docstrings are rows
        # the numbers are the same on any machine with these rows, and near with another Python's docstrings
        assert shown and abs(float(shown[1]) - float(value)) < (1e-3 if same_rows else 0.03), name


def test_correlations_of_the_readme_stand_in_the_committed_tables():
    """Every `value [low, high]` of the result table is a row of verdict_correlations.csv or verdict_controls.csv."""
    table = README.split("| claim |")[1].split("![")[0]
    found = re.findall(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]", table)
    assert len(found) >= 10
    data = {
        name: pd.read_csv(ROOT / "fig_plot" / "data" / f"verdict_{name}.csv") for name in ("correlations", "controls")
    }
    rows = [*data["correlations"].query("correlation == 'spearman'")[["value", "low", "high"]].to_numpy().tolist()]
    rows += data["controls"][["lead_over_random", "low", "high"]].to_numpy().tolist()
    for numbers in found:
        digits = [len(number.split(".")[1]) for number in numbers]
        shown = [float(number) for number in numbers]
        assert any([round(x, d) for x, d in zip(row, digits, strict=True)] == shown for row in rows), numbers


def test_makefile_and_ci_call_the_documented_commands():
    assert "make demo" in README and "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()
