"""Text from outside in a Markdown page: it can neither be HTML nor break a table."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup, escape


def text(value: Any) -> Any:
    """A value as text of a Markdown line: neither HTML, nor a table's bar, nor the end of the line."""
    if isinstance(value, Markup):
        return value
    return Markup(re.sub(r"[|`\[\]]", lambda found: f"&#{ord(found.group())};", escape(" ".join(str(value).split()))))


def code(value: Any) -> Markup:
    """A value as a Markdown code span, in which HTML is inert; it is fenced with more backticks than it holds."""
    line = " ".join(str(value).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    inner = line.replace("|", "\\|")
    return Markup(f"{fence} {inner} {fence}" if "`" in line else f"{fence}{inner}{fence}")
