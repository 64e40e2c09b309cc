"""Errors of the hub's libraries as one sentence that names the remedy; and the nearest known name."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from utils.script import CANNOT_WRITE, UserError


@dataclass(frozen=True)
class Repository:
    """What is sought on the hub, for the sentence about it."""

    name: str  # its id
    kind: str  # "Model" or "Dataset"
    known: tuple[str, ...]  # names that a wrong one may have meant
    instead: str  # what works without the hub
    revision: str | None = None
    revision_flag: str = "--revision"
    folder: Path | None = None  # where it is, if it is a local one

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{'datasets/' if self.kind == 'Dataset' else ''}{self.name}"


# exceptions, a pattern in their message, what is wrong, what fixes it; the first row that fits is taken
ERRORS: tuple[tuple[tuple[type[BaseException], ...], str, str, str], ...] = (
    ((GatedRepoError,), "", "is gated", "Accept its terms at {url}, then log in: hf auth login. Or use {instead}."),
    ((DatasetNotFoundError,), "gated", "is gated", "Accept its terms at {url}, then log in: hf auth login."),
    ((LocalTokenNotFoundError,), "", "needs a login", "Log in: hf auth login."),
    (
        (RevisionNotFoundError,),
        "",
        "has no revision {revision!r}",
        "Give {revision_flag} a branch, a tag or all 40 digits of a commit of {url}.",
    ),
    (
        (DatasetNotFoundError,),
        "revision",
        "has no revision {revision!r}",
        "Give {revision_flag} a branch, a tag or all 40 digits of a commit of {url}.",
    ),
    (
        (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError),
        "",
        "is no local file or folder, and the hub cannot be reached",
        "Connect once to download it (and unset HF_HUB_OFFLINE), or use {instead}.{nearest}",
    ),
    (
        (RepositoryNotFoundError, DatasetNotFoundError),
        "",
        "is no local file or folder, and does not exist on the hub or is private",
        "For a private one log in: hf auth login.{nearest}",
    ),
    (
        (RuntimeError,),
        "scripts are no longer supported",
        "holds a loading script, which is never executed",
        "The hub's conversion may serve: {revision_flag} refs/convert/parquet.",
    ),
    ((ValueError,), "trust_remote_code", "wants to run its own code", "Read it; then add --trust_remote_code."),
    (
        (ValueError,),
        "builderconfig|config name is",
        "needs another configuration",
        "Name it: --dataset_name {name}:<config>. {message}",
    ),
    ((SafetensorError,), "", "has weights that are {damaged}", "{again}"),
    ((Exception,), "PytorchStreamReader|pickle data", "has weights that are {damaged}", "{again}"),
    ((Exception,), r"line \d+ column \d+|valid json", "has a JSON file that is {damaged}", "{again}"),
    (
        (ValueError, OSError),
        "backend tokenizer",
        "has no file that holds its vocabulary, such as tokenizer.json",
        "Save one beside the model, or name another with --tokenizer_name.",
    ),
    ((ImportError,), "", "needs a package that is not installed", "{message}. Or choose a copy that does not need it."),
    ((DatasetsError, OSError, HTTPError, ValueError), "", "cannot be read", "{message}"),
    ((Exception,), "", "cannot be loaded with {files}", "{error}: {message}. The traceback is shown with --debug."),
)


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` with the known names closest to a wrong one; empty if none is close."""
    tails = {known_name.rsplit("/", 1)[-1].lower(): known_name for known_name in known}
    close = difflib.get_close_matches(name.rsplit("/", 1)[-1].lower(), tails, n=3, cutoff=0.6)
    close = [tail for tail in close if tails[tail] != name]
    return f" Did you mean {' or '.join(tails[tail] for tail in close)}?" if close else ""


def causes(error: BaseException) -> list[BaseException]:
    """The error, and what it was raised from, one after the other."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def shorten(message: str) -> str:
    """A library's message as one line, without what it says of its own functions and without colours."""
    line = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", message).split()).rstrip(".")
    return line if len(line) <= 400 else f"{line[:400]} ..."


@contextlib.contextmanager
def hub_errors(repository: Repository) -> Iterator[None]:
    """Turns what is raised while the repository is loaded into one sentence that says what fixes it.

    Raises:
        UserError: gated, unknown or private, no such revision or configuration, no connection, remote code, damaged
            (naming the file), or whatever else was raised, which is its cause.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain = causes(error)
        for cause in chain:
            if isinstance(cause, OSError) and cause.errno in CANNOT_WRITE:  # a full disk is not the hub's fault
                raise cause from None
        said = " ".join(str(error).split())
        facts = {name: getattr(repository, name) for name in ("name", "url", "revision", "revision_flag", "instead")}
        is_local = repository.folder is not None and repository.folder.is_dir()
        facts |= {"files": f"{repository.folder}/config.json" if is_local else "its files"}
        facts |= {
            "message": shorten(said),
            "error": type(error).__name__,
            "nearest": nearest(repository.name, repository.known),
            "damaged": f"damaged, cut short or a pointer of git-lfs ({shorten(said)})",
            "again": "Download it again; for a pointer run: git lfs pull.",
        }
        for kinds, pattern, fault, remedy in ERRORS:
            if re.search(pattern, said, re.IGNORECASE) and any(isinstance(cause, kinds) for cause in chain):
                fault, remedy = fault.format(**facts), remedy.format(**facts)
                raise UserError(f"{repository.kind} {repository.name} {fault}. {remedy}") from error
