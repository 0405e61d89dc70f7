from __future__ import annotations

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from conftest import run_configs
from scripts.brains.anatomy import Anatomy
from scripts.brains.brain import Brain, Randomisation
from scripts.brains.fields import SmoothField, radius
from scripts.brains.lesions import Lesion
from scripts.brains.scan import Scan
from scripts.brains.tissues import BRAIN, BRIGHTNESS, LABELS, MODALITIES, TUMOUR, Tissue, random_brightness
from scripts.brains.transforms import RandBraind
from scripts.brains.volumes import make_brains
from scripts.config import InputError
from scripts.data.subjects import load_subjects
from scripts.tools.phantom import main

NOT_RANDOM, RANDOM = Randomisation.of_strength(0), Randomisation()


def scanned(seed: int, randomisation: Randomisation = RANDOM, heights=(-10.0, 10.0, 30.0), size: int = 32):
    rng = np.random.default_rng(seed)
    brain = Brain(rng, randomisation)
    scan = Scan(rng, brain, randomisation)
    return scan, *scan.slices(heights, size)


def grid(step: float = 6.0) -> torch.Tensor:
    axis = torch.arange(-90, 91, step)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)


def test_a_field_is_smooth_and_independent_far_away():
    for length in (10, 40):
        points = torch.zeros(3, 3)
        points[:, 0] = torch.tensor([0.0, 1.0, 2.0 * length])
        values = torch.stack([SmoothField(np.random.default_rng(seed), length)(points) for seed in range(200)])
        assert 0.5 < values.std() < 1
        assert abs(values.mean()) < 0.1
        near, far = np.corrcoef(values.T)[0, 1:]
        assert near > 0.9
        assert abs(far) < 0.2


def test_a_field_is_zero_where_it_is_not_asked_for():
    points = torch.from_numpy(np.random.default_rng(0).uniform(-90, 90, (4, 5, 3))).float()
    where = points[..., 0] > 0
    for count in (1, 2):
        field = SmoothField(np.random.default_rng(1), 20, count)
        assert torch.equal(field(points, where), torch.where(where, field(points), 0))
        assert not field(points, torch.zeros_like(where)).any()


def test_radius_is_one_on_the_surface_of_an_ellipsoid():
    points = torch.tensor([[5.0, 0, 0], [1, 6, 0], [1, 0, 0]])
    assert torch.equal(radius(points, (1, 0, 0), (4, 6, 8)), torch.tensor([1.0, 1.0, 0.0]))


def test_a_head_has_its_parts_where_they_belong():
    for seed in range(5):
        anatomy = Anatomy(np.random.default_rng(seed))
        points = grid()
        tissue = anatomy(points)
        litres = (tissue >= BRAIN).float().mean() * 180**3 / 1e6
        assert 0.8 < litres < 2.2
        for part in (Tissue.SCALP, Tissue.SKULL, Tissue.GREY, Tissue.WHITE, Tissue.CSF, Tissue.EYE, Tissue.STEM):
            assert (tissue == part).any()
        assert points[tissue == Tissue.EYE][:, 1].min() > 20  # in front
        assert points[tissue == Tissue.VENTRICLE].norm(dim=-1).max() < 75
        assert tissue[0, 0, 0] == tissue[-1, -1, -1] == Tissue.AIR
        assert not (tissue >= TUMOUR).any()


def test_below_the_skull_is_a_neck_with_a_cord_in_its_canal():
    axis = torch.arange(-90, 91, 2.0)
    points = torch.stack(torch.meshgrid(axis, axis, torch.tensor([-100.0]), indexing="ij"), dim=-1)
    for seed in range(5):
        tissue = Anatomy(np.random.default_rng(seed))(points)
        for part in (Tissue.SCALP, Tissue.MUSCLE, Tissue.SKULL, Tissue.MENINGES, Tissue.CORD, Tissue.MUCOSA):
            assert (tissue == part).any()
        assert not (tissue >= BRAIN).any()
        right, front = points[tissue == Tissue.CORD][:, :2].T
        assert right.abs().mean() < 12
        assert front.mean() < -10


def test_without_mimics_there_are_none_and_with_them_there_are():
    mimics = torch.tensor([Tissue.VESSEL, Tissue.CHOROID, Tissue.WHITE_LESION])
    points = grid(4.0)
    plain, full = (
        [torch.isin(Anatomy(np.random.default_rng(seed), mimics=strength)(points), mimics) for seed in range(4)]
        for strength in (0, 1)
    )
    assert not any(found.any() for found in plain)
    assert all(found.any() for found in full)


def test_a_tumour_grows_in_the_brain_and_pushes_it_aside():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        anatomy = Anatomy(rng)
        lesion = Lesion(rng, anatomy)
        points = grid()
        before = anatomy(points)
        after = before.clone()
        lesion.paint(after, points)
        changed = after != before
        assert (after[changed] >= TUMOUR).all()
        assert (before[changed] >= BRAIN).all()
        far = (points - lesion.centre).norm(dim=-1) > 4 * lesion.radius
        moved = (lesion.push(points) - points).norm(dim=-1)
        assert not far.any() or moved[far].max() < 0.2
        assert moved.max() < lesion.radius


def test_a_resected_tumour_is_a_cavity_that_is_not_labelled():
    rng = np.random.default_rng(0)
    lesion = Lesion(rng, Anatomy(rng), resected=True)
    tissue = torch.full((3,), int(Tissue.WHITE))
    lesion.rough = []
    lesion.paint(tissue, lesion.centre + torch.tensor([[0.0, 0, 0], [0, 0, 0.01], [100, 0, 0]]))
    assert tissue.tolist() == [Tissue.CAVITY, Tissue.CAVITY, Tissue.WHITE]
    assert Tissue.CAVITY not in LABELS


def test_strength_0_keeps_the_brightness_of_the_table():
    rng = np.random.default_rng(0)
    assert np.allclose(random_brightness(rng, 0), [BRIGHTNESS[tissue] for tissue in Tissue])
    table = random_brightness(rng, 1)
    assert table.shape == (len(Tissue), len(MODALITIES))
    assert (table >= 0).all()
    assert not table[Tissue.AIR].any()
    assert not np.array_equal(table, random_brightness(rng, 1))


def test_a_scan_has_the_label_values_of_brats_and_is_stripped_in_half_of_the_cases():
    stripped = []
    for seed in range(30):
        scan, image, label = scanned(seed)
        assert image.shape == (4, 32, 32, 3)
        assert label.shape == (32, 32, 3)
        assert label.dtype == torch.uint8
        assert set(label.unique().tolist()) <= {0, 1, 2, 4}
        assert torch.isfinite(image).all()
        assert (image >= 0).all()
        if scan.stripped:
            assert (image[:, :2] == 0).all()
            assert (image[:, label > 0] > 0).all()
        stripped.append(scan.stripped)
    assert 8 < sum(stripped) < 22


def test_a_tumour_is_brighter_in_flair_without_randomisation():
    found = []
    for seed in range(12):
        _scan, image, label = scanned(seed, NOT_RANDOM, heights=np.arange(-40, 60, 8.0))
        brain = (image[0] > 0) & (label == 0)
        if (label == 2).sum() > 20:
            found.append((image[3][label == 2].mean() / image[3][brain].mean()).item())
    assert len(found) > 3
    assert min(found) > 1.2


def test_a_voxel_of_a_thick_slice_is_a_mean():
    rng = np.random.default_rng(3)
    brain = Brain(rng, NOT_RANDOM)
    scan = Scan(rng, brain, NOT_RANDOM)
    scan.noise[:], scan.moved_mm[:], scan.stripped = 1e-6, 0, True
    thin = [scan.slices([height], 48)[0] for height in np.arange(-5.5, 6)]
    scan.thickness = 12.0
    thick = scan.slices([0.0], 48)[0]
    nearest = min((thick - slices).abs().mean() for slices in thin)
    assert (thick - torch.stack(thin).mean(dim=0)).abs().mean() < 0.7 * nearest


def test_a_label_is_that_of_the_centre_of_its_voxel():
    for thickness in (1.0, 3.0, 5.0, 6.0):
        scan, _, _ = scanned(2)
        scan.brain.tissue = lambda points: torch.where(points[..., 2] > 0, int(Tissue.OEDEMA), int(Tissue.WHITE))
        scan.thickness, scan.rotation, scan.offset = thickness, torch.eye(3), torch.zeros(3)
        heights = thickness * np.array([-0.6, -0.1, 0.1, 0.6])
        _, label = scan.slices(heights, 8)
        assert label[4, 4].tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_strengths_lie_between_0_and_1(strength):
    with pytest.raises(InputError, match="must lie between 0 and 1"):
        Randomisation(contrast=strength)


def test_the_command_refuses_what_it_would_not_do(tmp_path, monkeypatch, capsys):
    for arguments in (["--randomise", "-1"], ["--randomise", "1", "--annotators", "3"]):
        monkeypatch.setattr("sys.argv", ["phantom", "--output_dir", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit):
            main()
        assert "--randomise" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_seed_fixes_every_voxel(tmp_path):
    assert torch.equal(scanned(5)[1], scanned(5)[1])
    assert not torch.equal(scanned(5)[1], scanned(6)[1])
    for name in ("a", "b"):
        make_brains(tmp_path / name, 2, 16, seed=3, randomisation=RANDOM)
    for file in sorted((tmp_path / "a").rglob("*.nii.gz")):
        again = nib.load(tmp_path / "b" / file.relative_to(tmp_path / "a"))
        assert np.array_equal(nib.load(file).get_fdata(), again.get_fdata())
        assert np.array_equal(nib.load(file).affine, again.affine)


def test_folders_of_brains_are_read_like_brats(tmp_path):
    make_brains(tmp_path, 3, 24, seed=1, randomisation=RANDOM)
    items = load_subjects(str(tmp_path), list(MODALITIES))
    assert [item["subject"] for item in items] == [f"BraTS20_Training_00{i}" for i in (1, 2, 3)]
    header = nib.load(items[0]["image"][0])
    assert header.shape[:2] == (24, 24)
    assert nib.aff2axcodes(header.affine) == ("R", "A", "S")
    middle = header.affine @ [11.5, 11.5, 0, 1]
    assert np.allclose(middle[:2], 0, atol=1e-3)
    assert 1 <= header.header.get_zooms()[2] <= 6


def test_drawn_slices_are_z_scored_and_mostly_through_the_tumour():
    draw = RandBraind(24, 6, {"LGG": 0, "HGG": 1})
    draw.set_random_state(1)
    items = [draw({"subject": "a"}) for _ in range(25)]
    assert {tuple(item["image"].shape) for item in items} == {(4, 24, 24, 6)}
    assert {tuple(item["label"].shape) for item in items} == {(1, 24, 24, 6)}
    assert {item["grade"] for item in items} == {-1, 0, 1}
    assert all(item["empty"] == (item["grade"] == -1) for item in items)
    sick = torch.stack([item["label"].flatten(0, 2).any(dim=0) for item in items if not item["empty"]])
    assert 0.5 < sick.float().mean() < 0.95
    image = torch.cat([item["image"][item["image"] != 0] for item in items])
    assert abs(image.mean()) < 0.3
    assert 0.7 < image.std() < 1.5
    draw.set_random_state(1)
    assert torch.equal(draw({})["image"], items[0]["image"])
    assert not torch.equal(draw({})["image"], items[0]["image"])


def test_unknown_randomisation_is_refused():
    with pytest.raises(TypeError, match="skul"):
        RandBraind(24, 6, {"LGG": 0, "HGG": 1}, randomisation={"skul": 0.0})


def test_weights_are_trained_on_brains_that_are_drawn(tmp_path):
    make_brains(tmp_path / "brains", 8, 24, seed=4, randomisation=RANDOM)
    out = {name: str(tmp_path / "out") for name in ("output_dir", "ckpt_dir")}
    brains = "$[{'subject': f'random brain {number}'} for number in range(6)]"
    run_configs(
        ["train.yaml", "augment_mr.yaml", "weights.yaml"],
        **out | {"dataset_dir": str(tmp_path / "brains"), "train::dataset::data": brains, "max_epochs": 1},
    )
    checkpoint = torch.load(tmp_path / "out" / "model.pt")
    assert checkpoint["settings"]["regions"] == ["TC", "WT", "ET"]
    assert checkpoint["settings"]["modality_dropout"] == 0.5
    table = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert np.isfinite(table["L_total"]).all()
