from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from benchmarks import randomisation
from scripts.brains.brain import Randomisation


def scores(dice):
    return pd.DataFrame({"patient": [f"patient {i}" for i in range(len(dice))], "dice_WT": dice})


def test_each_part_has_an_arm_that_turns_it_off():
    for part in randomisation.PARTS:
        _, keys = randomisation.ARMS[f"without {part}"]
        (values,) = keys.values()
        assert vars(Randomisation(**values)) == vars(Randomisation()) | {part: 0}


def test_scores_are_compared_to_the_first_arm_by_patient():
    rng = np.random.default_rng(0)
    full = rng.uniform(0.5, 0.9, 30)
    table = randomisation.compare({"all parts": scores(full), "without skull": scores(full - 0.25)}, "dice_WT")
    assert table["arm"].tolist() == ["all parts", "without skull"]
    assert table.loc[0, "mean Dice"].startswith(f"{full.mean():.3f} (")
    assert table["minus all parts"].tolist() == ["-", "-0.250 (-0.250 to -0.250)"]


def test_an_unknown_arm_is_refused(monkeypatch, capsys):
    folders = ["--brains", "a", "--dataset_dir", "b", "--output_dir", "c"]
    monkeypatch.setattr("sys.argv", ["randomisation.py", *folders, "--arms", "without skul"])
    with pytest.raises(SystemExit):
        randomisation.main()
    assert "without skul" in capsys.readouterr().err
