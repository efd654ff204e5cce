"""How tables look: as text, Markdown, CSV, JSON, LaTeX and figures. No number is computed here."""

from bench.report.render.figure import draw
from bench.report.render.formats import Form, joined
from bench.report.render.latex import to_latex
from bench.report.render.markdown import to_markdown
from bench.report.render.records import records, to_csv, to_json
from bench.report.render.text import to_text

__all__ = ["Form", "draw", "joined", "records", "to_csv", "to_json", "to_latex", "to_markdown", "to_text"]
