from __future__ import annotations

import pytest

from sdpnet.config.load import load_config
from sdpnet.config.setting import text_setting


@pytest.mark.parametrize(
    "text", ["[red]x", "1", "a: b", "~", "", 'it\'s "\\"', " x\n\x1b[2J", "猫 😀", "caf\udce9", "# no"]
)
def test_a_setting_that_is_text_stays_that_text(text: str) -> None:
    assert load_config("debug", [text_setting("data.path", text)]).data.path == text
