"""docs/methods.md says what the code says."""

import re
import runpy
from pathlib import Path

from kdvit import losses

TOOL = Path(__file__).parent.parent / "tools" / "methods_page.py"


def test_page_is_current():
    made = runpy.run_path(str(TOOL))
    assert made["PAGE"].read_text() == made["page"](), "run `python tools/methods_page.py`"


def test_page_names_every_method_with_all_that_is_asked_of_it():
    text = runpy.run_path(str(TOOL))["page"]()
    assert len(losses.names()) >= 7
    for name in losses.names():
        entry = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        checked = r"(Checked against \S+@[0-9a-f]{7}|no official code; from the paper)"
        assert re.search(rf"\nSource: .*https://.*{checked}", entry)
        facts = r"Extra parameters: ([\d,]+|two heads like the given ones)\. Extra forwards: .+\. Checked against: .+\."
        assert re.search(rf"\nReads: `\w+`.* {facts}\n", entry)
        assert re.search(r"\nPublished: \S", entry) and "\nInputs:\n\n- " in entry and "published values:\n\n" in entry
        assert re.search(rf"\n\| \[`{name}`\]\(#{name}\) \| ", text)


def test_counts_of_extra_parameters_by_hand():
    text = runpy.run_path(str(TOOL))["page"]()

    def count(name: str) -> str:
        return re.search(rf"\n## {name}\n.*?Extra parameters: ([\d,]+)\.", text, re.DOTALL)[1]

    assert count("kd") == "0"
    # FitNet: a 1x1 convolution without bias, and BatchNorm's two vectors.
    assert count("fitnet") == f"{192 * 384 + 2 * 384:,}"
