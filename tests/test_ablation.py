from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control, wilcoxon

from conftest import TINY_TRAINING
from scripts.config import BUNDLE_ROOT, InputError, TrainingError
from scripts.report.results import read_results
from scripts.tools.ablation import Ablation, compare, to_markdown

MAIN = {"bundle": str(BUNDLE_ROOT), "read": read_results, "plotted": ["dice", "auc"]}
SETTINGS = TINY_TRAINING | {"max_epochs": 1, "device": "cpu"}


def ablation(tmp_path, arms, grid=None, **options):
    given = MAIN | {"evaluation_keys": ["num_samples"], "configs": ["train.yaml"]}
    given |= {"settings": SETTINGS | {"max_epochs": 4}} | options
    return Ablation(output_dir=str(tmp_path), arms=arms, grid=grid or {}, **given)


def tables(effect=0.05, subjects=12):
    """Tables of two seeds. Arm b is better than a by ``effect`` in every subject, arm c is equal to a."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in (0, 1):
        base = rng.uniform(0.5, 0.9, subjects)
        for arm, dice in (("a", base), ("b", base + effect + rng.normal(0, 0.01, subjects)), ("c", base)):
            rows.append(
                pd.DataFrame({"subject": [f"s{i}" for i in range(subjects)], "dice": dice, "error": 0.1})
                .assign(arm=arm, seed=seed)
                .astype({"seed": int})
            )
    frame = pd.concat(rows)
    runs = frame.groupby(["arm", "seed"], as_index=False)["dice"].mean()
    return runs.assign(iou=runs["dice"], auc=np.nan, f1=np.nan, accuracy=np.nan), frame


def test_grid_is_every_combination(tmp_path):
    grid = {"conditioning": [[], ["highway", "anchor"]], "num_samples": [1, 5], "stages": ["joint"]}
    arms = ablation(tmp_path, {"plain": {}}, grid).arms
    assert [arm.name for arm in arms] == [
        "plain",
        "conditioning none, num_samples 1, stages joint",
        "conditioning none, num_samples 5, stages joint",
        "conditioning highway+anchor, num_samples 1, stages joint",
        "conditioning highway+anchor, num_samples 5, stages joint",
    ]


def test_arms_that_differ_in_sampling_share_their_training(tmp_path):
    one, many, other = ablation(tmp_path, {"one": {}, "many": {"num_samples": 5}, "other": {"variant": "B"}}).arms
    assert one.folder(tmp_path, 0) == many.folder(tmp_path, 0)
    assert one.evaluation(tmp_path, 0) != many.evaluation(tmp_path, 0)
    assert len({one.folder(tmp_path, 0), one.folder(tmp_path, 1), other.folder(tmp_path, 0)}) == 3


def test_arms_depend_on_the_first_training(tmp_path):
    plain, one, two = (
        ablation(tmp_path, {"a": {}}, first=first).arms[0].folder(tmp_path, 0)
        for first in (None, {"learning_rate": 0.1}, {"learning_rate": 0.2})
    )
    assert len({plain, one, two}) == 3


def test_a_first_training_that_fails_halfway_is_named(tmp_path):
    """It leaves a checkpoint, which no arm may use."""
    grid = ablation(tmp_path, {"a": {}}, first={"image_size": 30}, seeds=[0], settings=SETTINGS)
    folder = grid.first.folder(tmp_path, 0)
    folder.mkdir()
    (folder / "last.pt").write_bytes(b"of an earlier epoch")
    with pytest.raises(TrainingError, match=r"1 of 1 trainings failed:\ninit_ckpt, seed 0: error: "):
        grid.run()
    assert [path.name for path in tmp_path.glob("*_seed0")] == [folder.name]


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        ({}, {}, "nothing to run"),
        ({"a": {}}, {"seeds": []}, "nothing to run"),
        ({"a": {"varient": "S"}}, {}, "'varient' .did you mean 'variant'"),
        ({"a": {"configs": ["data_brats.yaml"]}}, {}, "data_brats.yaml.* are not files of configs/"),
        ({"a": {"dataset_dir": "nowhere"}}, {}, "dataset_dir 'nowhere' is not a folder"),
        ({"a": {"stages": "three"}}, {}, "arm 'a': stages 'three'"),
        ({"a": {}}, {"reference": "b"}, "reference 'b'"),
        ({"a": {"stages": "staged", "max_epochs": 3}}, {}, "arm 'a': three stages need max_epochs 4 or more, not 3"),
    ],
)
def test_bad_grids_are_refused_before_any_run(arms, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        ablation(tmp_path / "out", arms, **options)
    assert not (tmp_path / "out").exists()


def test_all_arms_have_as_many_epochs(tmp_path):
    with pytest.raises(InputError, match="settings must give max_epochs"):
        Ablation(**MAIN, output_dir=str(tmp_path), configs=["train.yaml"], settings={}, arms={"a": {}}, grid={})


def test_paired_tests_are_wilcoxons_over_subjects_corrected():
    runs, subjects = tables()
    table = compare(runs, subjects, "a").set_index("arm")
    dice = subjects.pivot_table(index="subject", columns="arm", values="dice")  # mean over the seeds
    expected = wilcoxon(dice["b"] - dice["a"]).pvalue
    assert table.loc["b", "dice_difference"] == pytest.approx((dice["b"] - dice["a"]).mean())
    assert table.loc["b", "dice_p"] == pytest.approx(false_discovery_control([expected])[0])
    assert table.loc["b", "dice_p"] < 0.01
    assert np.isnan(table.loc["a", "dice_p"])
    assert np.isnan(table.loc["c", "dice_p"])  # no subject differs: nothing to test
    assert table.loc["c", "dice_difference"] == 0
    assert table.loc["b", "dice_sd"] == pytest.approx(runs.query("arm == 'b'")["dice"].std())


def test_seeds_with_other_subjects_are_paired_within_the_seed():
    runs, subjects = tables()
    subjects.loc[subjects["seed"] == 1, "subject"] += "_other"
    table = compare(runs, subjects, "a").set_index("arm")
    wide = subjects.pivot_table(index="subject", columns="arm", values="dice")
    assert len(wide) == 24
    assert table.loc["b", "dice_p"] == pytest.approx(wilcoxon(wide["b"] - wide["a"]).pvalue)


def test_markdown_has_a_dash_where_nothing_was_learnt():
    runs, subjects = tables()
    lines = to_markdown(compare(runs, subjects, "a")).splitlines()
    head, cells = ([cell.strip() for cell in lines[row].strip("|").split("|")] for row in (0, 3))
    assert head[:3] == ["arm", "seeds", "dice"]
    assert cells[4] == "-"
    dice = runs.loc[runs["arm"] == "b", "dice"]
    assert cells[2] == f"{dice.mean():.3f} +- {dice.std():.3f}"


def test_runs_are_kept_and_failures_named(phantoms, tmp_path, monkeypatch):
    """A real grid with one seed: two arms share their training, and a third one cannot run."""
    settings = SETTINGS | {"dataset_dir": str(phantoms)}
    arms = {"joint": {}, "three samples": {"num_samples": 3}, "odd": {"image_size": 30}}

    def grid(**more):
        return ablation(tmp_path, {**arms, **more}, settings=settings, seeds=[0], processes=2)

    with pytest.raises(TrainingError, match="1 of 2 trainings failed(.|\n)*odd, seed 0: error: image_size"):
        grid().run()
    table = pd.read_csv(tmp_path / "table.csv")
    assert table["arm"].tolist() == ["joint", "three samples"]
    assert table["dice"].between(0, 1).all()
    assert (tmp_path / "ablation.png").stat().st_size > 5000
    parts = pd.read_csv(tmp_path / "parts.csv").set_index("part")
    assert parts.loc["WT", "joint"] == pytest.approx(table["dice"][0], abs=1e-5)  # the only region
    trained = next(tmp_path.glob("*/last.pt")).stat().st_mtime_ns
    del arms["odd"]
    monkeypatch.setattr("scripts.tools.ablation.workers", None)  # finished runs need no worker
    grid().run()
    assert next(tmp_path.glob("*/last.pt")).stat().st_mtime_ns == trained
    assert len(pd.read_csv(tmp_path / "runs.csv")) == 2
