"""Cells under headings: a table of the page, saved as Markdown and LaTeX, printed as text."""

from dataclasses import dataclass
from pathlib import Path

from promptkd.files import write_text

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "±": r"$\pm$",
    "‖": r"$\Vert$",
    "→": r"$\to$",
}


@dataclass(frozen=True)
class Cell:
    """A value and what stands small beside it (its interval). ``best`` is printed bold."""

    text: str
    detail: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Cells under headings; the first column names the row."""

    name: str
    title: str
    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def to_markdown(self) -> str:
        """GitHub's tables; | in a cell is escaped."""
        lines = [
            "| " + " | ".join(_markdown(h) for h in self.headings) + " |",
            "|" + "---|" * len(self.headings),
        ]
        for row in self.rows:
            cells = []
            for cell in row:
                text = _markdown(cell.text)
                text = f"**{text}**" if cell.best else text
                cells.append(f"{text} {_markdown(cell.detail)}".strip())
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", _markdown(self.caption), ""])

    def to_latex(self) -> str:
        """A booktabs table."""
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{l{'r' * (len(self.headings) - 1)}}}",
            r"\toprule",
            " & ".join(_latex(h) for h in self.headings) + r" \\",
            r"\midrule",
        ]
        for row in self.rows:
            cells = []
            for cell in row:
                text = _latex(cell.text)
                text = rf"\textbf{{{text}}}" if cell.best else text
                small = rf" {{\scriptsize {_latex(cell.detail)}}}" if cell.detail else ""
                cells.append(text + small)
            lines.append(" & ".join(cells) + r" \\")
        return "\n".join(
            [
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
                rf"\caption{{{_latex(self.caption)}}}",
                r"\end{table}",
                "",
            ]
        )

    def to_text(self) -> str:
        """Columns under each other, for a terminal."""
        cells = [[f"{cell.text} {cell.detail}".strip() for cell in row] for row in self.rows]
        columns = list(zip(self.headings, *cells, strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in zip(*columns, strict=True)
        ]
        return "\n".join([self.title, *lines, self.caption])

    def write(self, directory: Path) -> None:
        """Write NAME.md and NAME.tex."""
        write_text(directory / f"{self.name}.md", self.to_markdown())
        write_text(directory / f"{self.name}.tex", self.to_latex())


def _markdown(text: str) -> str:
    for special in "\\|*_`<":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))
