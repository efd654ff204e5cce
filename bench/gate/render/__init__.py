"""How a check looks: text, Markdown, JUnit XML, JSON, a badge, annotations. No number is computed here."""

from bench.gate.render.annotations import to_annotations
from bench.gate.render.badge import to_badge
from bench.gate.render.junit import to_junit
from bench.gate.render.markdown import COMMENT, SUMMARY, to_markdown
from bench.gate.render.records import to_json
from bench.gate.render.text import to_text

__all__ = [
    "COMMENT",
    "SUMMARY",
    "to_annotations",
    "to_badge",
    "to_json",
    "to_junit",
    "to_markdown",
    "to_text",
]
