"""Turn errors of the hub's libraries into one sentence that names the remedy; find the nearest known name."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from utils.script import NO_PLACE, UserError


@dataclass(frozen=True)
class Repository:
    """A repository that a user asked for, on the hub or in a folder."""

    name: str
    kind: str  # "Model" or "Dataset"
    known: tuple[str, ...]  # names that a wrong one may have meant
    instead: str  # an alternative that does not need the hub
    revision: str | None = None


# A regular expression for "class of the error, its bases and causes: message"; the fault; the remedy. The first row
# that matches counts. The rows name the classes, to import none of their libraries.
CAUSES = (
    (r"GatedRepoError|DatasetNotFoundError.*gated", "is gated",
     "Accept its terms at {url}, then log in: hf auth login. Or use {instead}."),
    (r"Token is required|LocalTokenNotFoundError", "needs a login", "Log in: hf auth login. Or use {instead}."),
    (r"RevisionNotFoundError|DatasetNotFoundError.*revision", "has no revision {revision!r}",
     "Give {revision_flag} a branch, a tag or all 40 digits of a commit of {url}."),
    (r"OfflineModeIsEnabled|LocalEntryNotFoundError|\bConnectionError", "is not local, and the hub cannot be reached",
     "Connect once to download it (and unset HF_HUB_OFFLINE), or use {instead}.{nearest}"),
    (r"RepositoryNotFoundError|DatasetNotFoundError", "is not local, and does not exist on the hub or is private",
     "If it is private, log in: hf auth login.{nearest}"),
    (r"scripts are no longer supported", "needs its loading script, which this program never executes",
     "Try the hub's conversion: {revision_flag} refs/convert/parquet."),
    (r"ValueError.*trust_remote_code", "needs to run its own code", "Read that code; then add --trust_remote_code."),
    (r"ValueError.*(builderconfig|config name is)", "needs another configuration",
     "Name it: --dataset_name {name}:<config>. {message}."),
    (r"SafetensorError|PytorchStreamReader|pickle data|line \d+ column \d+|valid json", "has weights or settings that "
     "are damaged, cut short or a pointer of git-lfs ({message})",
     "Download it again; for a pointer run: git lfs pull."),
    (r"(ValueError|OSError).*backend tokenizer", "has no file that holds its vocabulary, such as tokenizer.json",
     "Save one beside the model, or name another with --tokenizer_name."),
    (r"\bImportError", "needs a package that is not installed", "{message}. Or choose a copy that does not need it."),
    (r"DatasetsError|OSError|HTTPError|ValueError", "cannot be read", "{message}."),
    (r"", "cannot be loaded, as with a wrong config.json", "{error}: {message}. --debug shows the traceback."),
)  # fmt: skip


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` with the known names closest to a wrong one; empty if none is close."""
    tails = {known_name.rsplit("/", 1)[-1].lower(): known_name for known_name in known if known_name != name}
    close = difflib.get_close_matches(name.rsplit("/", 1)[-1].lower(), tails, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(tails[tail] for tail in close)}?" if close else ""


def shorten(message: str) -> str:
    """A library's message as one line without colours."""
    line = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", message).split()).rstrip(".")
    return line if len(line) <= 400 else f"{line[:400]} ..."


@contextlib.contextmanager
def hub_errors(repository: Repository) -> Iterator[None]:
    """Turns any error of a library into one UserError with its cause and remedy; a full disk stays an OSError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        for cause in chain:
            if isinstance(cause, OSError) and cause.errno in NO_PLACE:  # a fault of the disk, not of the hub
                raise cause from None
        said = " ".join([*(base.__name__ for cause in chain for base in type(cause).__mro__), ":", str(error)])
        _, fault, remedy = next(row for row in CAUSES if re.search(row[0], said, re.IGNORECASE | re.DOTALL))
        folder, flag = ("datasets/", "--dataset_revision") if repository.kind == "Dataset" else ("", "--revision")
        words = asdict(repository) | {"url": f"https://huggingface.co/{folder}{repository.name}", "revision_flag": flag}
        words |= {"message": shorten(str(error)), "error": type(error).__name__}
        words |= {"nearest": nearest(repository.name, repository.known)}
        raise UserError(f"{{kind}} {{name}} {fault}. {remedy}".format(**words)) from error
