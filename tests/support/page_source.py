"""The charts, the scripts and the content security policy in a page of the project."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from typing import Any

import plotly.graph_objects
from plotly.offline import get_plotlyjs

SCRIPT = re.compile(r"<script([^>]*)>(.*?)</script>", re.DOTALL)


def scripts(source: str) -> list[tuple[str, str]]:
    """(attributes, content) of each script element."""
    return [(attributes.strip(), content) for attributes, content in SCRIPT.findall(source)]


def figures(source: str) -> list[dict[str, Any]]:
    """The figures of the charts, in the order of the page. Plotly checks that it knows every key in them."""
    found = [json.loads(content) for attributes, content in scripts(source) if "json" in attributes]
    for figure in found:
        plotly.graph_objects.Figure(figure)
    return found


def without_library(source: str) -> str:
    """The page without Plotly's packed copy and the script that draws."""
    return SCRIPT.sub(lambda match: match[0] if "json" in match[1] else "", source)


def require_self_contained(source: str) -> None:
    """Requires that the page loads nothing, and runs no script except Plotly and that of the project."""
    packed, own = (content for attributes, content in scripts(source) if "json" not in attributes)
    unpacked = gzip.decompress(base64.b64decode(packed, validate=True)).decode()
    assert unpacked == get_plotlyjs()
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', source)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("script-src").split() == [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (own, unpacked)
    ]
    assert rules == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
    }
    rest = without_library(source)
    assert "url(" not in rest and "@import" not in rest
