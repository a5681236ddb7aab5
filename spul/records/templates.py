"""Templates (jinja2) of model cards and reports, whose values are escaped for the format that they are in."""

from __future__ import annotations

import json
import re
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, block: str | None = None, **values: Any) -> str:
    """Fill in one of spul's templates.

    Every value is escaped: as HTML in a `.html.jinja` template; by `escape_markdown` in a `.md.jinja` template, unless
    it passes through the filter `code` (a code span) or `literal` (a string in a code block).

    Args:
        template: path of the template, relative to the package, such as `"records/card.md.jinja"`.
        block: name of a block to render alone.
        values: the template's variables.

    Raises:
        jinja2.UndefinedError: if a variable is missing.
    """
    found = _environment(html=template.endswith(".html.jinja")).get_template(template)
    if block is None:
        return found.render(values)
    return "".join(found.blocks[block](found.new_context(values)))


@cache
def _environment(html: bool) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def escaped(value: Any) -> str:
        return value if isinstance(value, Markup) else escape_markdown(str(value))

    environment = Environment(
        loader=PackageLoader("spul", "."),
        autoescape=html,
        finalize=None if html else escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = lambda value: Markup(code_span(str(value)))
    environment.filters["literal"] = lambda value: Markup(json.dumps(str(value), ensure_ascii=False))
    return environment


def escape_markdown(text: str) -> str:
    """Plain text as one line of Markdown, without any markup of its own (HTML, emphasis, code, links, table cells)."""
    text = escape(" ".join(text.split()), quote=False)
    for mark in ("\\", "`", "*", "|"):
        text = text.replace(mark, "\\" + mark)
    return text.replace("](", "]\\(")


def code_span(text: str) -> str:
    """Plain text as a Markdown code span on one line, fenced by more backticks than the text has in a row."""
    text = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    padding = " " if not text or text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"
