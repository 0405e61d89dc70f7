from __future__ import annotations

import json

import pandas as pd
import pytest
from test_evaluation import results

from scripts.config import InputError


def test_results_of_several_models_share_a_file(tmp_path):
    table = pd.DataFrame(
        {"dice_disc": [0.8, 1.0], "iou_disc": [0.7, 0.9], "dice_cup": [0.5, 0.7], "iou_cup": [0.3, 0.5]}
    )
    results(tmp_path, model="A").write(table, ["disc"])
    results(tmp_path, model="B").write(table, ["disc", "cup"])
    results(tmp_path, model="A").write(table[1:], ["disc"])
    content = json.loads((tmp_path / "evaluation_results.json").read_text())
    assert list(content) == ["dataset", "threshold", "evaluation_models", "gt_dir", "results"]
    assert [content[key] for key in ("dataset", "threshold", "gt_dir")] == ["d", 0.5, "g"]
    assert content["evaluation_models"] == ["A", "B"]
    assert content["results"]["A"] == {"dice": 1.0, "iou": 0.9, "num_samples": 1}
    both = content["results"]["B"]
    assert (both["dice"], both["iou"], both["num_samples"]) == (pytest.approx(0.75), pytest.approx(0.6), 2)
    assert both["regions"]["cup"] == {"dice": pytest.approx(0.6), "iou": pytest.approx(0.4)}


@pytest.mark.parametrize(
    ("other", "message"), [({"dataset": "e"}, "of dataset 'd', not of 'e'"), ({"gt_dir": "h"}, "'h'")]
)
def test_results_of_another_data_set_are_not_mixed(tmp_path, other, message):
    results(tmp_path).write(pd.DataFrame({"dice_a": [1.0], "iou_a": [1.0]}), ["a"])
    with pytest.raises(InputError, match=message):
        results(tmp_path, **other)


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_file_that_holds_no_results_is_not_replaced(tmp_path, text):
    (tmp_path / "evaluation_results.json").write_text(text)
    with pytest.raises(InputError, match="not a file of results"):
        results(tmp_path)
