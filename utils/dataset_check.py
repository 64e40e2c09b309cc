"""Compares local copies of the known datasets with the table: `python -m utils.data --check FOLDER`.

Each copy is read through the same loader as in a run, and what it holds is printed beside what the table says.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.data import LabelledTexts, leaked_share, load_texts
from utils.datasets_table import DATASETS, SPECS, DatasetSpec
from utils.io import UserError
from utils.labels import is_missing
from utils.sources import Source, copied_source, copy_folder
