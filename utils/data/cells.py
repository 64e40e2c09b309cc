"""Cells of a table as labels and as texts.

Missing labels, counted and left out: no value, a blank, NaN, -1 (a hidden label, unless it is a regression target), and
the words of pandas, R and SQL for a missing value: nan, NaN, null, NULL, N/A, n/a, #N/A, <NA>, NaT in any case, `NA`
and `None` in these letters. A class that is called so needs another name, which the warning says; `none` and `na` in
other letters are classes, and that is said too. Blanks around a label are taken off, and said; classes that differ by
case or by blanks within stay two, and are named.

A file without types (csv), or one with 1 and "1", gives numbers as strings. They are numbers if every label of the
column is written as a number is: 7 and 0.25, but not 007, +7, 1e3 or .25; trailing zeros only where all have as many
decimals (0.50, 0.75). Else they are classes, as they are if two of them are the same number (versions 1.1 and 1.10).

Texts are strings, bytes of UTF-8, numbers and dates; choices become "(0) first (1) second", as in the paper. A cell of
another kind is refused by column and row.
"""

import ast
import datetime
import decimal
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import filterfalse
from typing import Any

from utils.script import UserError, warn

WHOLE = re.compile(r"0|-?[1-9][0-9]*")
FRACTION = re.compile(r"-?(0|[1-9][0-9]*)\.([0-9]+)")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MISSING_ANY_CASE = {"nan", "+nan", "-nan", "null", "n/a", "#n/a", "#na", "<na>", "nat"}
MISSING_AS_WRITTEN = {"NA", "None"}
MOST_DIGITS = 4000  # Python converts no more than 4,300


def listed(items: Iterable[Any]) -> str:
    """The first five items, by commas, and dots for the rest."""
    items = list(items)
    return ", ".join(map(str, items[:5])) + (", ..." if len(items) > 5 else "")


# ------------------------------------------------------------------ labels
def is_number(label: Any) -> bool:
    """Whether a cell is a number; True and False are classes."""
    return isinstance(label, int | float) and not isinstance(label, bool)


def is_whole(label: float) -> bool:
    return isinstance(label, int) or label.is_integer()  # an int of 400 digits is no float


def is_missing(label: Any, regression: bool = False) -> bool:
    """Whether a cell is no label: see the head of this file; -1 is a target like any other in a regression."""
    if isinstance(label, str):
        word = label.strip()
        return not word or word in MISSING_AS_WRITTEN or word.lower() in MISSING_ANY_CASE
    if isinstance(label, float | decimal.Decimal) and math.isnan(label):
        return True
    return label is None or (is_number(label) and label == -1 and not regression)


def _plain(label: Any) -> Any:
    """A cell as None, bool, int, float or str without blanks around it; other kinds stay what they are."""
    if isinstance(label, bytes):
        label = label.decode(errors="backslashreplace")
    if isinstance(label, decimal.Decimal):
        return int(label) if label.is_finite() and label == label.to_integral_value() else float(label)
    if isinstance(label, datetime.date | datetime.time):
        return label.isoformat()
    return label.strip().strip("\ufeff\u200b") if isinstance(label, str) else label


def label_cells(source: str, cells: Sequence[Any]) -> list[Any]:
    """The cells of a label column as None, bool, int, float or str; a list of one label is that label.

    Args:
        source: name of the dataset, for messages.
        cells: the cells of all splits, so that each kind is decided once.

    Raises:
        UserError: a label is a list or an object, or some are truth values and others numbers.
    """
    lists = [label for label in cells if isinstance(label, list)]
    if any(len(label) != 1 for label in lists):
        raise UserError(f"The labels of {source} are lists; one label per text is needed (--label_column).")
    if lists:
        warn(f"{len(lists)} labels of {source} are lists of one; their element is taken")
    labels = [label[0] if isinstance(label, list) else label for label in cells]
    for number, label in enumerate(labels, 1):
        if isinstance(label, dict):
            raise UserError(
                f"Label {number} of {source} is an object with the keys {listed(label)}. See --label_column."
            )
    blanks = sum(isinstance(label, str) and label != label.strip() and bool(label.strip()) for label in labels)
    if blanks:
        warn(f"{blanks} labels of {source} have blanks around them, which are taken off")
    labels = typed([_plain(label) for label in labels])
    if any(isinstance(label, bool) for label in labels) and any(map(is_number, filterfalse(is_missing, labels))):
        raise UserError(f"The labels of {source} mix true or false with numbers. Write all of them in one way.")
    return labels


def typed(labels: list[Any]) -> list[Any]:
    """Strings as numbers, if every label that is not missing is a number or written as one."""
    present = [label for label in labels if not is_missing(label, True)]
    words = {label for label in present if isinstance(label, str)}
    if not words or not all(is_number(label) or isinstance(label, str) for label in present):
        return labels
    if all(WHOLE.fullmatch(word) and len(word) <= MOST_DIGITS for word in words):
        kind: type = int
    elif _are_fractions(words | {str(label) for label in present if isinstance(label, float) and not is_whole(label)}):
        kind = float
    else:
        return labels
    return [None if is_missing(label, True) else kind(label) if isinstance(label, str) else label for label in labels]


def _are_fractions(words: set[str]) -> bool:
    """Whether different words are different numbers with decimals, each written as a number is."""
    matches = [FRACTION.fullmatch(word) for word in words]
    same_length = len({len(match[2]) if match else 0 for match in matches}) == 1
    for word, match in zip(words, matches, strict=True):
        trailing_zero = match is not None and match[2].endswith("0") and match[2] != "0"
        plain = WHOLE.fullmatch(word) or (match and (same_length or not trailing_zero))
        if not _is_finite(word) or not (plain or word == repr(float(word))):  # 1e-05
            return False
    return len({float(word) for word in words}) == len(words)


def _is_finite(word: str) -> bool:
    """Whether a word is a number that a float can hold, however it is written."""
    return NUMBER.fullmatch(word) is not None and math.isfinite(float(word))


def describe_missing(labels: Sequence[Any], missing: Sequence[bool]) -> str:
    """Row numbers and spellings of the missing labels."""
    rows = [row for row, is_absent in enumerate(missing) if is_absent]
    words = dict.fromkeys(repr(labels[row].strip()) for row in rows if isinstance(labels[row], str))
    words.pop("''", None)
    spelled = f"; written {listed(words)}: a class called so needs another name" if words else ""
    return f": rows {listed(row + 1 for row in rows)}{spelled}"


def check_words(source: str, part: str, labels: Sequence[Any]) -> None:
    """Raises UserError where few labels of a split are words, and the others numbers with decimals."""
    present = [(row, str(label)) for row, label in enumerate(labels, 1) if not is_missing(label, True)]
    words = [(row, word) for row, word in present if not _is_finite(word)]
    has_decimals = any(_is_finite(word) and not float(word).is_integer() for _, word in present)
    if words and has_decimals and 2 * len(words) < len(present):
        row, word = words[0]
        raise UserError(
            f"Most labels of {source} are numbers with decimals, but {part} row {row} is {word[:40]!r}. "
            "Leave it empty where it is missing, or take --task classification."
        )


def target_cells(source: str, part: str, labels: Sequence[Any]) -> list[float | None]:
    """Regression targets as finite numbers; a missing one is None. Raises UserError naming another one's row."""
    numbers: list[float | None] = []
    for row, label in enumerate(labels, 1):
        try:
            number = None if is_missing(label, True) else float(label)
            fault = "infinite or too large" if number is not None and math.isinf(number) else ""
        except (TypeError, ValueError):
            fault = f"not a number: {str(label)[:40]!r}"
        except OverflowError:
            fault = "infinite or too large"
        if fault:
            raise UserError(
                f"The target of {source}, {part} row {row}, is {fault}. Correct it, or take --task classification."
            )
        numbers.append(number)
    return numbers


def class_values(source: str, labels: Sequence[Any]) -> list[Any]:
    """Labels, none missing, as values that sort and compare: whole numbers as int, everything else as str."""
    if all(is_number(label) and is_whole(label) for label in labels):
        return [int(label) for label in labels]
    values = [str(int(label) if isinstance(label, float) and label.is_integer() else label) for label in labels]
    classes = sorted(set(values))
    near: dict[str, list[str]] = {}
    for name in classes:
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        number = NUMBER.fullmatch(key) and len(key) <= 15
        near.setdefault(f"{float(key):g}" if number else key, []).append(name)
        if key in {"none", "na"}:
            warn(f"{name!r} is a class of {source}; leave the label empty where it means that there is none")
    groups = [" and ".join(map(repr, names)) for names in near.values() if len(names) > 1]
    if groups:
        warn(f"{source} has classes that differ only in case or spelling: {listed(groups)}; they stay separate classes")
    if any(isinstance(label, str) for label in labels) and all(map(NUMBER.fullmatch, classes)):
        warn(
            f"{source} has labels that are not written as numbers are: all are names of classes (or --task regression)"
        )
    return values


# ------------------------------------------------------------------ texts
# keys that may stand beside `text` in an object whose text it is, as in the hub's {label, text}
BESIDE_TEXT = {"text", "label", "labels", "key", "id", "index", "answer_start"}
BYTES_LITERAL = re.compile(r"""b'.*'|b".*\"""", re.DOTALL)


def holds_text(values: Sequence[Any]) -> bool:
    """Whether any value is a string that is not just a number."""
    return any(isinstance(value, str) and value.strip() and not NUMBER.fullmatch(value) for value in values)


def render(value: Any, in_list: bool = False) -> str:
    """A cell as text; empty for a missing value (None, NaN).

    Choices are a list, of strings or of objects with a `text`, or the hub's {label: [...], text: [...]}.

    Raises:
        ValueError: the cell is not evidently text; the message describes it.
    """
    if isinstance(value, dict) and "text" in value and set(value) <= BESIDE_TEXT:
        value = value["text"]
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float | decimal.Decimal) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError("bytes that are not UTF-8") from None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return f"{value:f}"
    if is_number(value) and (isinstance(value, int) or math.isfinite(value)):
        return str(value)
    if isinstance(value, list) and not in_list:
        try:
            return " ".join(f"({number}) {render(choice, True)}" for number, choice in enumerate(value))
        except ValueError as error:
            raise ValueError(f"a list with {error}") from None
    if isinstance(value, dict):
        raise ValueError(f"an object with the keys {listed(map(repr, value))}")
    raise ValueError(f"{'a list' if isinstance(value, list) else type(value).__name__}: {str(value)[:40]}")


def render_column(source: str, part: str, name: str, cells: Iterable[Any]) -> list[str]:
    """The cells of one column as texts; `source`, `part` (the split) and `name` (the column) are for messages.

    Two wrappings are taken off, and said, where every text of the column has them: Python's b'...' (toxigen), and a
    line break at the end (sms_spam).

    Differs from the paper: the line break is the end of a file's line; as the last token of every text it would be all
    that `--pooling last` sees.

    Raises:
        UserError: a cell is not evidently text; its column, row and content are named.
    """
    texts = []
    for row, cell in enumerate(cells, 1):
        try:
            texts.append(render(cell))
        except ValueError as error:
            raise UserError(
                f"Column {name!r} of {source}, {part} row {row}, holds {error}. Write it as a string, or as a list of "
                'strings or of {"text": ...} objects for choices, or name other columns (--text_template).'
            ) from None
    if all(BYTES_LITERAL.fullmatch(text) or not text.strip() for text in texts) and any(map(str.strip, texts)):
        try:
            texts = [ast.literal_eval(text).decode() if text.strip() else text for text in texts]
            print(f"{source}: the {part} texts of {name!r} are written as Python bytes; b'...' is taken off")
        except (ValueError, SyntaxError, AttributeError):  # not UTF-8, not ASCII, b'a' + b'b'
            pass
    if len(texts) > 1 and all(text.endswith("\n") for text in texts):
        print(f"{source}: every {part} text of {name!r} ends with a line break, which is taken off")
        texts = [text.removesuffix("\n").removesuffix("\r") for text in texts]
    return texts
