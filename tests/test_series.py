"""Descriptions of series, as the app of MONAI Label sorts them into modalities."""

from __future__ import annotations

import re

import pytest
import yaml

from conftest import ROOT

PATTERNS = yaml.safe_load((ROOT / "configs" / "inference.yaml").read_text(encoding="utf-8"))["label_app"]["series"]


@pytest.mark.parametrize(
    ("modality", "descriptions"),
    [
        ("flair", ["Ax T2 FLAIR", "FLAIR_longTR", "sag 3D flair"]),
        ("t2", ["Ax T2 TSE", "t2_tirm"]),
        ("t1", ["Ax T1", "t1_space_sag", "T1 SPACE", "Ax T1 pre contrast", "T1 w/o contrast", "T1 non-contrast"]),
        ("t1", ["Ax T1 FLAIR", "T1_MPRAGE_pre", "T1 without Gd", "AX T1 C-"]),
        ("t1ce", ["Ax T1 post Gd", "T1CE", "t1c", "AX T1 C+", "T1 +C", "t1_mprage_gad", "T1 contrast", "T1_ce"]),
        ("t1ce", ["T1 SPACE post", "T1 compressed sense GD"]),
        (None, ["DWI b1000", "ADC", "localizer"]),
    ],
)
def test_descriptions_are_sorted(modality, descriptions):
    for text in descriptions:
        found = [name for name, pattern in PATTERNS.items() if re.search(pattern, text, re.IGNORECASE)]
        assert next(iter(found), None) == modality, text
