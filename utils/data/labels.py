"""Cells of a label column: which are missing, which are numbers, which are one class.

Missing, counted and left out: no value, a blank, NaN, -1 (a hidden label, unless it is a regression target), and what
pandas, R and SQL write for a missing value: nan, NaN, null, NULL, N/A, n/a, #N/A, <NA>, NaT in any case, `NA` and
`None` in these letters. A class that is called so needs another name, which the warning says; `none` and `na` in
other letters are classes, and that is said too. Blanks around a label are taken off, and said; classes that differ by
case or by blanks within stay two, and are named.
"""

import datetime
import decimal
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from utils.parallel import rank
from utils.script import UserError

WHOLE = re.compile(r"-?(0|[1-9]\d*)")  # "007" stays a name
DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE)
EXACT_DIGITS = 15  # as many digits a float keeps; a longer whole number is a name, like that of a post
MISSING_ANY_CASE = {"nan", "+nan", "-nan", "null", "n/a", "#n/a", "#na", "<na>", "nat"}
MISSING_AS_WRITTEN = {"NA", "None"}
SHOWN = 5


def warn(message: str) -> None:
    if rank() == 0:
        print(f"warning: {message}", file=sys.stderr)


def listed(items: Sequence[Any], shown: int = SHOWN) -> str:
    """The first items, by commas, and dots for the rest."""
    return ", ".join(map(str, items[:shown])) + (", ..." if len(items) > shown else "")


def is_number(label: Any) -> bool:
    """Whether a cell is a number; True and False are classes."""
    return isinstance(label, int | float) and not isinstance(label, bool)


def is_whole(label: float) -> bool:
    return isinstance(label, int) or label.is_integer()  # an int of 400 digits is no float


def is_missing(label: Any, regression: bool = False) -> bool:
    """No label: see the head of this file; -1 is a target like any other in a regression."""
    if label is None:
        return True
    if isinstance(label, str):
        word = label.strip()
        return not word or word in MISSING_AS_WRITTEN or word.lower() in MISSING_ANY_CASE
    if isinstance(label, decimal.Decimal):
        return label.is_nan()
    if isinstance(label, float) and math.isnan(label):
        return True
    return bool(is_number(label) and label == -1 and not regression)


def _plain(label: Any) -> Any:
    """A cell as None, bool, int, float or str without blanks around it; other kinds stay what they are."""
    if isinstance(label, np.generic):  # numpy's numbers and dates
        label = label.item()
    if isinstance(label, bytes):
        label = label.decode(errors="backslashreplace")
    if isinstance(label, decimal.Decimal) and not label.is_nan():
        whole = label.is_finite() and label == label.to_integral_value()
        return int(label) if whole else float(label)
    if isinstance(label, datetime.date | datetime.time):
        return label.isoformat()
    return label.strip().strip("\ufeff\u200b") if isinstance(label, str) else label


def label_cells(source: str, labels: Iterable[Any]) -> list[Any]:
    """The cells of a label column as None, bool, int, float or str; a list of one label is that label.

    Strings that are all numbers become numbers: csv knows no others, and a file may hold 1 and "1".

    Args:
        source: name of the dataset, for messages.
        labels: the cells of all splits, so that each kind is decided once.

    Raises:
        UserError: a label is a list or an object.
    """
    cells = list(labels)
    lists = [label for label in cells if isinstance(label, list | tuple | np.ndarray)]
    if lists and all(len(label) == 1 for label in lists):
        if len(lists) < len([label for label in cells if label is not None]):
            warn(f"{len(lists)} labels of {source} are lists of one; their element is taken")
        else:
            print(f"{source}: each label is a list of one; its element is taken")
        cells = [label[0] if isinstance(label, list | tuple | np.ndarray) else label for label in cells]
    elif lists:
        raise UserError(f"The labels of {source} are lists; one label per text is needed (--label_column).")
    nested = next((number for number, label in enumerate(cells, 1) if isinstance(label, dict)), None)
    if nested:
        keys = listed(list(cells[nested - 1]))
        raise UserError(f"Label {nested} of {source} is an object with the keys {keys}. See --label_column.")
    blanks = sum(isinstance(label, str) and label != label.strip() and bool(label.strip()) for label in cells)
    if blanks:
        warn(f"{blanks} labels of {source} have blanks around them, which are taken off")
    return typed(list(map(_plain, cells)))


def typed(labels: list[Any]) -> list[Any]:
    """Strings as numbers, if every label that is not missing is a number or the digits of one."""
    present = [label for label in labels if not is_missing(label, True)]
    words = [label for label in present if isinstance(label, str)]
    if not words or not all(is_number(label) or isinstance(label, str) for label in present):
        return labels
    if all(WHOLE.fullmatch(word) for word in words):
        kind: type = int
        fits = all(len(word) < 4000 for word in words)  # Python converts no more than 4,300 digits
    else:
        kind = float
        fits = all(DECIMAL.fullmatch(word) and not _loses_digits(word) for word in words)
    if not fits:
        return labels
    return [None if is_missing(label, True) else kind(label) if isinstance(label, str) else label for label in labels]


def _loses_digits(word: str) -> bool:
    """Whether a number without decimals has more digits than a float keeps, so that two names would become one."""
    return word.lstrip("+-").isdigit() and len(word.lstrip("+-0")) > EXACT_DIGITS


def told_missing(labels: Sequence[Any], missing: Sequence[int]) -> str:
    """How the labels that are left out are written, and where they stand, for a warning.

    Args:
        labels: the cells of one split.
        missing: numbers of its rows without a label, from 0.
    """
    words = Counter(labels[row].strip() for row in missing if isinstance(labels[row], str) and labels[row].strip())
    told = f": rows {listed([row + 1 for row in missing])}"
    if words:
        told += f"; written {listed([repr(word) for word in words])}: a class called so needs another name"
    return told


def odd_word(labels: Sequence[Any]) -> int | None:
    """Number from 1 of the first word among fractions; None where all labels are numbers, or evidently classes.

    Args:
        labels: cells as `label_cells` gives them; evidently classes are those without fractions or mostly words.
    """
    present = [(row, label) for row, label in enumerate(labels, 1) if not is_missing(label, True)]
    words = [row for row, label in present if isinstance(label, str) and not DECIMAL.fullmatch(label)]
    fractions = any(
        "." in str(label) and not float(label).is_integer()
        for _, label in present
        if isinstance(label, float) or (isinstance(label, str) and DECIMAL.fullmatch(label))
    )
    return words[0] if words and fractions and 2 * len(words) < len(present) else None


def check_words(source: str, labels: Mapping[str, Sequence[Any]]) -> None:
    """Raises UserError where one label among fractions is a word, which would make each number a class.

    Args:
        source: name of the dataset, for the message.
        labels: cells by split.
    """
    for part, cells in labels.items():
        row = odd_word(cells)
        if row is not None:
            raise UserError(
                f"Most labels of {source} are numbers with decimals, but {part} row {row} is {cells[row - 1][:40]!r}. "
                "Leave it empty where it is missing, or take --task classification."
            )


def target_cells(source: str, part: str, labels: Sequence[Any]) -> list[float | None]:
    """Regression targets as finite numbers; a missing one is None.

    Args:
        source: name of the dataset, for messages.
        part: the split.
        labels: its cells, as `label_cells` gives them.

    Raises:
        UserError: a target is no number, or infinite; its row is named. Or True and 1 are both targets.
    """
    check_truth_values(source, labels)
    numbers: list[float | None] = []
    for row, label in enumerate(labels, 1):
        try:
            number = None if is_missing(label, True) else float(label)
        except (TypeError, ValueError):
            raise UserError(
                f"The target of {source}, {part} row {row}, is not a number: {str(label)[:40]!r}. "
                "Correct it, or take --task classification."
            ) from None
        except OverflowError:
            number = math.inf
        if number is not None and math.isnan(number):
            number = None
        if number is not None and math.isinf(number):
            raise UserError(f"The target of {source}, {part} row {row}, is infinite or too large. Remove that row.")
        numbers.append(number)
    return numbers


def check_truth_values(source: str, labels: Sequence[Any]) -> None:
    """Raises UserError where some labels are true or false and others numbers, which 1 and 0 would join."""
    if any(isinstance(label, bool) for label in labels) and any(map(is_number, labels)):
        raise UserError(f"The labels of {source} mix true or false with numbers. Write all of them in one way.")


def class_values(source: str, labels: list[Any]) -> list[Any]:
    """Labels as values that sort and compare: whole numbers as int, everything else as str.

    Args:
        source: name of the dataset, for messages.
        labels: cells as `label_cells` gives them, none missing.

    Raises:
        UserError: True and 1 are both labels.
    """
    check_truth_values(source, labels)
    if all(is_number(label) and is_whole(label) for label in labels):
        return [int(label) for label in labels]
    values = [_word(label) for label in labels]
    tell_near_classes(source, values)
    return values


def _word(label: Any) -> str:
    """The name of a class: 1.0 is "1", as it is where all labels are numbers."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label)


def tell_near_classes(source: str, values: Iterable[str]) -> None:
    """Warns of classes that may be one: they differ by case, by blanks, by 1 and 1.0, or are called none."""
    kinds: dict[str, list[str]] = {}
    for value in sorted(set(values)):
        key = " ".join(unicodedata.normalize("NFKC", value).casefold().split())
        number = DECIMAL.fullmatch(key) and len(key) <= EXACT_DIGITS
        kinds.setdefault(f"{float(key):g}" if number else key, []).append(value)
        if key in {"none", "na"}:
            warn(f"{value!r} is a class of {source}; leave the label empty where it means that there is none")
    near = [" and ".join(map(repr, names)) for names in kinds.values() if len(names) > 1]
    if near:
        warn(f"{source} has classes that differ only in case or spelling: {listed(near)}; they stay separate classes")
