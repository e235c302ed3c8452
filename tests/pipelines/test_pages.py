"""The document that pages share: escaping, its policy, and what is imported when."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import pytest
from page_source import figures, require_self_contained

from sdpnet.pipelines.pages.chart import Chart, layout, plotly_text
from sdpnet.pipelines.pages.document import render

TEMPLATE = """{% extends "base.html.j2" %}{% from "macros.html.j2" import chart_figure, name %}
{% block title %}{{ title }}{% endblock %}
{% block main %}{{ name(title) }}{{ chart_figure(chart) }}{% endblock %}"""
HOSTILE = '</script><img src=x onerror="alert(1)">\x1b[31m\u202e'


def drawn(tmp_path: Path, text: str) -> str:
    template = tmp_path / "page.html.j2"
    template.write_text(TEMPLATE)
    figure = {"data": [{"x": [1], "y": [2], "name": text}], "layout": layout({}, {})}
    return render(template, title=text, chart=Chart(text, text, figure, ["", text], [[text, text]], text))


def test_text_stays_text_everywhere(tmp_path: Path) -> None:
    source = drawn(tmp_path, HOSTILE)
    require_self_contained(source)
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(source)
    assert "img" not in tags and tags.count("script") == 3
    assert (
        "\x1b" not in source
        and "\u202e" not in source
        and source.count(r"onerror=&#34;alert(1)&#34;&gt;\x1b[31m\u202e") == 8
    )
    (figure,) = figures(source)
    assert figure["data"][0]["name"] == HOSTILE, (
        "in JSON it is text already; plotly_text is for what Plotly reads as HTML"
    )


def test_plotly_shows_text_as_it_is() -> None:
    assert plotly_text("<b>a&amp;b</b>\n") == r"&lt;b&gt;a&amp;amp;b&lt;/b&gt;\n"
    assert plotly_text("<" * 41) == f"{'&lt;' * 20}…{'&lt;' * 20}" and plotly_text("<" * 40) == "&lt;" * 40


def test_a_value_that_the_template_lacks_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "page.html.j2").write_text("{{ absent }}")
    with pytest.raises(jinja2.UndefinedError):
        render(tmp_path / "page.html.j2")


def test_a_number_that_is_not_finite_cannot_enter_a_figure(tmp_path: Path) -> None:
    (tmp_path / "page.html.j2").write_text("{{ x | tojson }}")
    with pytest.raises(ValueError, match="Out of range float"):
        render(tmp_path / "page.html.j2", x=float("nan"))


@pytest.mark.parametrize("module", ["sdpnet.commands.report", "sdpnet.preprocess.describe"])
def test_the_libraries_are_imported_only_when_a_page_is_drawn(module: str) -> None:
    code = f"import sys, {module}; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = f"import sys, {module}; sys.exit('jinja2' in sys.modules and 'torch' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
