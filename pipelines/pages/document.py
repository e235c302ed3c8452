"""Renders one self-contained HTML file: Jinja2 escapes everything that comes from data, and Plotly draws the charts.

The page contains its own copy of plotly.min.js, compressed with gzip (2.0 MB instead of 4.8), and loads nothing else.
Its content security policy forbids all requests and all scripts except the two that it names by their SHA-256. Plotly
and Jinja2 are imported only when a page is rendered.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from pathlib import Path
from typing import Any, Final

from sdpnet.pipelines.errors import BackendMissingError, printable
from sdpnet.pipelines.terminal.remedy import missing_package

__all__ = ["render"]

HERE: Final = Path(__file__).parent


def render(template: Path, **values: Any) -> str:
    """Renders a template to a whole HTML document.

    Args:
        template: a Jinja2 template that extends `base.html.j2` of this folder.
        values: the template's variables. Text is made printable and escaped.

    Raises:
        BackendMissingError: Jinja2 or Plotly is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise BackendMissingError(missing_package(error) or str(error)) from None

    def shown(value: Any) -> Any:
        """Keeps control characters and direction marks out of the page."""
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE, template.parent]),
        autoescape=True,
        finalize=shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    plotly, script = get_plotlyjs(), (HERE / "charts.js").read_text(encoding="utf-8")
    return environment.get_template(template.name).render(
        **values,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hashes=[_sha256(script), _sha256(plotly)],
        plotly=Markup(base64.b64encode(gzip.compress(plotly.encode(), mtime=0)).decode("ascii")),
    )


def _sha256(script: str) -> str:
    """The SHA-256 of a script in base64, which identifies it in a content security policy."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
