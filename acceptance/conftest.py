"""The checks that need minutes, or an environment of their own: `make conformance`, `docs-test`, `label-test`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
