"""Text of tables."""

from __future__ import annotations


def markdown(header: list[str], rows: list[list[str]], words: int = 1) -> str:
    """A Markdown table; the first ``words`` columns are aligned to the left, the others to the right."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """A table for a terminal; the first column is aligned to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: list[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])
