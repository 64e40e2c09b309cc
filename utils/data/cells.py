"""Turn the cells of a table into labels and texts.

Missing labels are: no value, a blank, NaN, -1 (a hidden label, unless it is a regression target), and the words of
pandas, R and SQL for a missing value: nan, null, N/A, #N/A, <NA> and NaT in any case, `NA` and `None` in these letters.
The loader leaves them out, with a warning that counts them; a class with such a name needs another one. It strips
blanks around labels, and warns of classes that differ only in case, inner blanks or the spelling of one number.

A file without types (csv), or one with 1 and "1", gives numbers as strings. They become numbers if every label of the
column is a plain number: 7 and 0.25, but not 007, +7, 1e3 or .25; trailing zeros only if all labels have equally many
decimals (0.50, 0.75). Otherwise they are classes, also if two labels are the same number (versions 1.1 and 1.10).

Texts are strings, bytes of UTF-8, numbers and dates; choices become "(0) first (1) second", as in the paper. For a cell
of another kind the error names its column and row.
"""

import ast
import contextlib
import datetime
import decimal
import math
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from utils.script import UserError, warn

WHOLE = re.compile(r"0|-?[1-9][0-9]{0,3999}")  # Python converts no more than 4,300 digits
FRACTION = re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+")
PLAIN = re.compile(r"-?(0|[1-9][0-9]*)(\.0|\.[0-9]*[1-9])?")  # no trailing zeros
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MISSING_ANY_CASE = {"nan", "+nan", "-nan", "null", "n/a", "#n/a", "#na", "<na>", "nat"}
MISSING_AS_WRITTEN = {"NA", "None"}


def listed(items: Iterable[Any]) -> str:
    """The first five items, joined by commas, and dots for the rest."""
    items = list(items)
    return ", ".join(map(str, items[:5])) + (", ..." if len(items) > 5 else "")


def is_number(cell: Any) -> bool:
    """True if a cell is a number; True and False are classes."""
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def is_finite(word: str) -> bool:
    """True if a word is a number that a float can hold, in any notation."""
    return NUMBER.fullmatch(word) is not None and math.isfinite(float(word))


def _plain(cell: Any) -> str | int | float | None:
    """A cell as the string, number, truth value or missing value that it stands for. Raises ValueError otherwise."""
    try:
        if isinstance(cell, str):
            cell.encode()  # JSON can hold half a character, such as \ud800
        if isinstance(cell, bytes):
            return cell.decode()
    except UnicodeError as error:
        raise ValueError(f"text that is not UTF-8 ({error})") from None
    if isinstance(cell, decimal.Decimal):
        return int(cell) if cell.is_finite() and cell == cell.to_integral_value() else float(cell)
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    if cell is None or isinstance(cell, str | int | float):
        return cell
    raise ValueError(f"a {type(cell).__name__}: {str(cell)[:60]}")


def is_missing(label: Any, regression: bool = False) -> bool:
    """True if a cell is a missing label, as defined at the top of this file; in a regression -1 is a target."""
    if isinstance(label, str):
        word = label.strip()
        return not word or word in MISSING_AS_WRITTEN or word.lower() in MISSING_ANY_CASE
    if isinstance(label, float | decimal.Decimal) and math.isnan(label):
        return True
    return label is None or (is_number(label) and label == -1 and not regression)


def label_values(source: str, cells: Iterable[Any], regression: bool | None) -> tuple[list[Any], bool]:
    """Labels of all splits as regression targets or class values, None if missing; and True for a regression.

    `source` names the dataset in messages. If `regression` is None, the labels decide.
    """
    labels = []
    for number, cell in enumerate(cells, 1):
        try:
            label = _plain(cell)
        except ValueError as error:
            raise UserError(f"Label {number} of {source} is {error}. Name another column: --label_column.") from None
        labels.append(label.strip() if isinstance(label, str) else label)
    labels = typed(labels)
    kinds = {type(label) for label in labels if not is_missing(label)}
    if bool in kinds and kinds & {int, float}:
        raise UserError(f"The labels of {source} mix true or false with numbers. Write all labels in one form.")
    if regression is None:
        regression = _are_targets(source, [label for label in labels if not is_missing(label, True)])
    labels = [None if is_missing(label, regression) else label for label in labels]
    return (_targets if regression else _classes)(source, labels), regression


def typed(labels: list[Any]) -> list[Any]:
    """Strings as numbers, if every label that is not missing is a plain number; else the labels unchanged."""
    words = {str(label) for label in labels if not is_missing(label, True)}
    if not words or not any(isinstance(label, str) for label in labels):
        return labels
    kind = int if all(map(WHOLE.fullmatch, words)) else float if _are_decimals(words) else None
    return [None if is_missing(label, True) else kind(label) for label in labels] if kind else labels


def _are_decimals(words: set[str]) -> bool:
    """True if all words are plain, finite numbers, and different words are different numbers."""
    if not all(map(is_finite, words)):
        return False
    aligned = all(map(FRACTION.fullmatch, words)) and len({len(word.partition(".")[2]) for word in words}) == 1
    canonical = all(PLAIN.fullmatch(word) or word == repr(float(word)) for word in words)
    return (aligned or canonical) and len({float(word) for word in words}) == len(words)


def _are_targets(source: str, labels: list[Any]) -> bool:
    """True if all labels are numbers and some have decimals. Raises UserError for such numbers with a few words."""
    if all(map(is_number, labels)):
        return any(isinstance(label, float) and not label.is_integer() for label in labels)
    spelled = list(map(str, labels))
    words = [word for word in spelled if not is_finite(word)]
    has_decimals = any(is_finite(word) and not float(word).is_integer() for word in spelled)
    if has_decimals and 0 < 2 * len(words) < len(spelled):
        found = f"Most labels of {source} are numbers with decimals, but some are words: {listed(map(repr, words))}"
        raise UserError(f"{found}. Leave missing labels empty, or set --task classification.")
    return False


def _targets(source: str, labels: list[Any]) -> list[float | None]:
    for number, label in enumerate(labels, 1):
        if label is not None and not is_finite(str(label)):
            found = f"Target {number} of {source} is no finite number: {str(label)[:40]!r}"
            raise UserError(f"{found}. Correct it, or set --task classification.")
    return [None if label is None else float(label) for label in labels]


def _classes(source: str, labels: list[Any]) -> list[Any]:
    """Class values of one type, int if all are whole numbers, else str; warns of classes with similar names."""
    labels = [int(label) if isinstance(label, float) and label.is_integer() else label for label in labels]
    if all(label is None or type(label) is int for label in labels):
        return labels
    names = [None if label is None else str(label) for label in labels]
    near: dict[str, list[str]] = {}
    for name in sorted(set(filter(None, names))):
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        near.setdefault(f"{float(key):g}" if NUMBER.fullmatch(key) and len(key) <= 15 else key, []).append(name)
    groups = [" and ".join(map(repr, group)) for group in near.values() if len(group) > 1]
    if groups:
        warn(f"{source} has classes that differ only in case or spelling: {listed(groups)}; they stay separate classes")
    if any(isinstance(label, str) for label in labels) and all(map(NUMBER.fullmatch, filter(None, names))):
        warn(f"{source} has oddly written numbers as labels: they name classes, unless you set --task regression")
    return names


def _as_text(cell: Any) -> str:
    cell = _plain(cell)
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, bool) or cell in (math.inf, -math.inf):
        raise ValueError(f"a {type(cell).__name__}: {cell}")
    return str(cell)


def render(cell: Any) -> str:
    """A cell as text; empty for a missing one (None, NaN). Raises ValueError for a cell that is no text.

    Choices are a list of strings, or the hub's {label: [...], text: [...]}.
    """
    if isinstance(cell, dict) and cell.keys() == {"label", "text"}:
        cell = cell["text"]
    if isinstance(cell, list):
        return " ".join(f"({number}) {_as_text(choice)}" for number, choice in enumerate(cell))
    return _as_text(cell)


def render_column(source: str, part: str, name: str, cells: Iterable[Any]) -> list[str]:
    """The cells of one column as texts; `source`, `part` (the split) and `name` (the column) are for messages.

    Removes Python's b'...' (toxigen) and a final line break (sms_spam) if every text has them. Differs from the paper:
    otherwise `--pooling last` would see the same line break in every text.
    """
    texts = []
    for row, cell in enumerate(cells, 1):
        try:
            texts.append(render(cell))
        except ValueError as error:
            found = f"Column {name!r} of {source}, {part} row {row}, holds {error}"
            raise UserError(f"{found}. Write a string, or a list of strings; or see --text_template.") from None
    filled = [text for text in texts if text.strip()]
    if filled and all(text.startswith(("b'", 'b"')) for text in filled):
        with contextlib.suppress(ValueError, SyntaxError, AttributeError):  # a text that only looks like bytes
            texts = [ast.literal_eval(text).decode() if text.strip() else text for text in texts]
    if len(texts) > 1 and all(text.endswith("\n") for text in texts):
        texts = [text.removesuffix("\n").removesuffix("\r") for text in texts]
    return texts
