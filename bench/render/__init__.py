"""How tables look: as text, Markdown, CSV, JSON, LaTeX and figures. No number is computed here."""

from bench.render.figure import draw
from bench.render.formats import Form, joined
from bench.render.latex import to_latex
from bench.render.markdown import to_markdown
from bench.render.records import records, to_csv, to_json
from bench.render.text import to_text

__all__ = ["Form", "draw", "joined", "records", "to_csv", "to_json", "to_latex", "to_markdown", "to_text"]
