"""The lifecycle in docs/how-it-works.md is the one in ``gockpt.core.save_state.TABLE``.

``python tests/test_lifecycle_diagram.py`` draws it anew.
"""

from __future__ import annotations

import re
from pathlib import Path

from gockpt.core.save_state import TABLE, State, advance

PAGE = Path(__file__).resolve().parent.parent / "docs" / "how-it-works.md"
BLOCK = re.compile(r"(?<=```mermaid\n)(.*?)(?=^```$)", re.MULTILINE | re.DOTALL)


def diagram():
    """Return the table as a state diagram: each arrow with its event, and the commands below it."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.IDLE.value}"]
    for (state, event), transition in TABLE.items():
        commands = "".join(f"<br/>→ {command.value}" for command in transition.commands)
        lines.append(f"    {state.value} --> {transition.state.value}: {event.value}{commands}")
    return "\n".join(lines) + "\n"


def drawn(text):
    """Return the page with the diagram drawn anew."""
    return BLOCK.sub(lambda _: diagram(), text, count=1)


def test_the_diagram_in_the_docs_is_the_table():
    text = PAGE.read_text()
    assert len(BLOCK.findall(text)) == 1
    assert text == drawn(text), "python tests/test_lifecycle_diagram.py draws it anew"


def test_every_state_is_explained():
    listed = re.findall(r"^- \*(\w+)\*:", PAGE.read_text(), re.MULTILINE)
    assert listed == [state.value for state in State]


def test_every_arrow_is_a_transition():
    arrows = re.findall(r"^    (\w+) --> (\w+): ([^<\n]+)", diagram(), re.MULTILINE)
    assert len(arrows) == len(TABLE)
    by_event = {(state.value, event.value): (state, event) for state, event in TABLE}
    for start, end, event in arrows:
        assert advance(*by_event[start, event]).state.value == end


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text()))
