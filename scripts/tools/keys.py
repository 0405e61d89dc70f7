"""Write the tables of public keys into docs/keys.md, from configs/train.yaml: ``python -m scripts.tools.keys``."""

from __future__ import annotations

import re

from scripts.config import BUNDLE_ROOT, atomic_path

PAGE = BUNDLE_ROOT / "docs" / "keys.md"
START, END = "<!-- generated from configs/train.yaml -->\n", "<!-- end -->\n"
KEY = re.compile(r"^(?P<key>\w+): *(?P<default>.*?) +# (?P<meaning>.*)$")


def tables() -> str:
    """Markdown of one table per section of public keys.

    Raises:
        ValueError: naming a public key without a comment.
    """
    text = (BUNDLE_ROOT / "configs" / "train.yaml").read_text(encoding="utf-8")
    rows = []
    for line in filter(None, text[text.index("# ---- data") : text.index("\nsubjects:")].splitlines()):
        if line.startswith("# ---- "):
            rows += [f"\n## {line[7:].capitalize()}\n", "| key | default | meaning |", "|---|---|---|"]
        elif match := KEY.match(line):
            default, meaning = (match[name].replace("|", "\\|") for name in ("default", "meaning"))
            rows.append(f"| `{match['key']}` | `{default}` | {meaning} |")
        else:
            raise ValueError(f"configs/train.yaml: '{line}' has no comment")
    return "\n".join(rows) + "\n\n"


def main() -> None:
    """Replace the tables of the page."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    with atomic_path(PAGE) as path:
        path.write_text(before + START + tables() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
