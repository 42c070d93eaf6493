"""docs/methods.md says what the code says."""

import runpy
from pathlib import Path

from kdvit import losses

TOOL = Path(__file__).parent.parent / "tools" / "methods_page.py"


def test_page_is_current():
    made = runpy.run_path(str(TOOL))
    assert made["PAGE"].read_text() == made["page"](), "run `python tools/methods_page.py`"


def test_page_names_every_method_with_its_source():
    text = runpy.run_path(str(TOOL))["page"]()
    assert len(losses.names()) >= 7
    for name in losses.names():
        entry = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert "Source: " in entry and "Checked against " in entry
