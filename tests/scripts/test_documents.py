"""The README and the Makefile: every file that they name exists, and every command works."""

import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT, run_in_process
from utils.data.table import SPECS
from utils.models.table import MODELS
from utils.script import parse
from utils.settings import all_settings

README = (ROOT / "README.md").read_text()
MODELS_AND_DATA = (ROOT / "docs" / "models_and_data.md").read_text()
PAGES = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
PROGRAM = r"python (?:-m \w+\.\w+|\S+\.py)"  # a module of a package, or a script
BLOCKS = re.findall(rf"^ {{4}}({PROGRAM}.*?)(?: +#.*)?$", PAGES, flags=re.MULTILINE)
COMMANDS = sorted({*BLOCKS, *re.findall(rf"`({PROGRAM}[^`]*)`", PAGES)})
SCRIPTS = sorted({path.name for path in ROOT.glob("*.py")})


def makefile_commands(target: str) -> list[list[str]]:
    """The python commands of a target, as `make` would run them."""
    make = ["make", "--dry-run", "--old-file=.venv/.ready", target]  # in any environment
    printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [shlex.split(line)[1:] for line in printed.splitlines() if re.match(rf"\S*{PROGRAM}", line)]


def test_every_file_and_module_that_the_pages_name_exists():
    named = set(re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|txt|toml|ipynb|mplstyle))\b", PAGES))
    modules = set(re.findall(r" -m (\w+\.\w+(?:\.\w+)?)", PAGES + (ROOT / "Makefile").read_text()))
    assert {"cache.py", "K_sweep.py"} <= named and "fig_plot.findings" in modules
    assert not [name for name in named if not (ROOT / name).is_file()]
    paths = [ROOT / module.replace(".", "/") for module in modules]
    assert not [path for path in paths if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file())]


def test_the_pages_name_every_script_dataset_and_model():
    assert not [script for script in SCRIPTS if f"`{script}`" not in README and f"    {script}" not in README]
    assert not [spec.key for spec in SPECS if f"`{spec.key}`" not in MODELS_AND_DATA]
    for name in MODELS:
        assert f"`{name}`" in MODELS_AND_DATA or f"`-{name.split('-', 1)[1]}`" in MODELS_AND_DATA, name


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_parse(command):
    """Every flag exists: the command is parsed by its script's own Config."""
    script, *arguments = shlex.split(command.removeprefix("python ").removeprefix("-m "))
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if hasattr(module, "Config"):
        parse(module.Config, arguments)
    else:
        assert not arguments


@pytest.mark.parametrize(
    "module",
    [*(script.removesuffix(".py") for script in SCRIPTS), "demo.pretrain", "demo.real_llm", "demo.random_twin"],
)
def test_help_explains_every_field(module, capsys):
    """Every setting has a flag, and the help explains it by the comment beside it."""
    config_class = importlib.import_module(module).Config
    with pytest.raises(SystemExit):
        parse(config_class, ["--help"])
    shown = " ".join(re.sub("[│╭╰─╮╯]", " ", capsys.readouterr().out.replace("_", "-")).split())
    groups = [type(value) for value in vars(config_class()).values() if dataclasses.is_dataclass(value)]
    for settings in [config_class, *groups]:
        source = "".join(inspect.getsource(base) for base in settings.__mro__ if dataclasses.is_dataclass(base))
        for field in dataclasses.fields(settings):
            if field.name in all_settings(config_class()):
                comment = re.search(rf"^    {field.name}: .*?# (.*)", source, flags=re.MULTILINE)
                assert comment, f"{field.name} has no comment"
                if "conf.Positional" not in comment[0]:
                    assert f"--{field.name}".replace("_", "-") in shown
                assert " ".join(comment[1].replace("_", "-").split())[:25] in shown, field.name


@pytest.mark.slow
def test_make_demo_ends_with_the_readme_numbers(tmp_path, monkeypatch, capsys):
    """The commands of `make demo`, and the table the README shows, on a machine with the same docstrings."""
    commands = makefile_commands("demo")
    assert [command[0] for command in commands] == ["cache.py", "cache.py", "K_sweep.py"]
    for command in commands:
        assert run_in_process(monkeypatch, *command, "--results_dir", tmp_path) == 0
    printed, path = capsys.readouterr().out, tmp_path / "ntps" / "tiny" / "docstrings__library.json"
    assert printed.strip().splitlines()[-1] == str(path)
    assert path.with_suffix(".png").is_file()
    of_tiny = README[README.index("`make demo` prints:") : README.index("`make demo MODEL=smollm2`")]
    readme_scores = re.findall(r"^ {6}(ntps\w*|retained) +(0\.\d{4})", of_tiny, flags=re.MULTILINE)
    assert len(readme_scores) == 4
    for name, value in readme_scores:
        shown = re.search(rf"^  {name} +(0\.\d{{4}})", printed, flags=re.MULTILINE)
        same_rows = sys.version_info[:3] == (3, 11, 7)  # another Python has other docstrings, and near numbers
        assert shown and abs(float(shown[1]) - float(value)) < (1e-3 if same_rows else 0.03), name
