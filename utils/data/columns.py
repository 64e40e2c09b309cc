"""Which columns of a table are the text and the label, and a row's text from them."""

import string
from typing import Any

from utils.data.files import Table
from utils.data.sources import Source
from utils.data.texts import holds_text, render_column
from utils.script import UserError
from utils.settings import Data


def column(source: Source, part: Table, name: str, flag: str) -> list[Any]:
    """One column; `flag` is what names another one.

    Raises:
        UserError: there is no such column.
    """
    if name not in part.columns:
        present = ", ".join(part.columns) or "none"
        raise UserError(f"{source.name} has no column {name!r}; columns: {present}. Name one with {flag}.")
    return list(part.columns[name][:])


def label_column_name(settings: Data, source: Source, part: Table) -> str:
    """The label column: as asked for, as the table of datasets has it, or `label` / `labels`."""
    chosen = settings.label_column or (source.spec.label_column if source.spec else None)
    return chosen or next((name for name in ("label", "labels") if name in part.columns), "label")


def text_pieces(settings: Data, source: Source, part: Table, label: str) -> list[tuple[str, str | None]]:
    """A text as pieces of (literal, column behind it): of the template, of one column, or of the only text column.

    Raises:
        UserError: two ways are asked for, the template is malformed, or no column is the evident one.
    """
    if settings.text_column and settings.text_template:
        raise UserError("--text_column and --text_template exclude each other: give one of them.")
    if settings.text_column:
        return [("", settings.text_column)]
    template = settings.text_template or (source.spec.text_template if source.spec else None)
    if template is not None:
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            raise UserError(f"--text_template {template!r} is malformed ({error}).") from None
        names = [name for _, name, _, _ in parsed if name is not None]
        if not names or "" in names or any(form or conversion for _, _, form, conversion in parsed):
            raise UserError(
                f'--text_template {template!r} must name columns in braces, like "{{question}} {{choices}}".'
            )
        return [(literal, name) for literal, name, _, _ in parsed]
    if "text" in part.columns:
        return [("", "text")]
    candidates = [name for name in part.columns if name != label and holds_text(part.columns[name][:])]
    if len(candidates) != 1:
        raise UserError(
            f"Which column of {source.name} is the text? Columns: {', '.join(part.columns) or 'none'}. "
            "Name one with --text_column, or several with --text_template."
        )
    return [("", candidates[0])]


def join_texts(source: Source, part_name: str, part: Table, pieces: list[tuple[str, str | None]]) -> list[str]:
    """One text per row; empty where every column is blank, whatever the template puts around them."""
    flag = "--text_column or --text_template"
    names = [name for _, name in pieces if name is not None]
    columns = [render_column(source.name, part_name, name, column(source, part, name, flag)) for name in names]
    texts = []
    for cells in zip(*columns, strict=True):
        rest = iter(cells)
        joined = "".join(literal + (next(rest) if name is not None else "") for literal, name in pieces)
        texts.append(joined if any(cell.strip() for cell in cells) else "")
    return texts
