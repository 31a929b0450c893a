"""``Table``: what every view returns; rows for programs, text for people."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence

Row = dict[str, object]


class Table:
    """Rows with named columns, a title above and notes below.

    ``str`` prints it, ``.rows`` are dictionaries, :meth:`to_json` and :meth:`to_csv` are for files.

    >>> print(Table(("name", "bits"), [{"name": "fc", "bits": 4}]))
    name      bits
    ------  ------
    fc           4
    """

    def __init__(
        self,
        columns: Sequence[str],
        rows: Sequence[Row],
        title: str = "",
        notes: Sequence[str] = (),
    ) -> None:
        self.columns = tuple(columns)
        self.rows = list(rows)
        self.title = title
        self.notes = tuple(notes)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def _tabulate(self, style: str) -> str:
        from tabulate import tabulate

        cells = [[row[column] for column in self.columns] for row in self.rows]
        return tabulate(cells, self.columns, tablefmt=style, disable_numparse=False)

    def __str__(self) -> str:
        parts = [self.title, self._tabulate("simple"), *self.notes]
        return "\n".join(part for part in parts if part)

    def _repr_html_(self) -> str:
        return self._tabulate("html")

    def to_json(self) -> str:
        """The title, rows and notes as one JSON object."""
        content = {"title": self.title, "rows": self.rows, "notes": list(self.notes)}
        return json.dumps(content, indent=1)

    def to_csv(self) -> str:
        """A header line and one line per row."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({column: row[column] for column in self.columns} for row in self.rows)
        return buffer.getvalue()
