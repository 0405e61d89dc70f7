"""From an archive to a segmentation in a viewer and back: Orthanc, MONAI Label, OHIF. Run by `make clinic-test`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import psutil
import pydicom
import pytest
import requests
from clinic import (
    DESCRIPTIONS,
    Archive,
    Proxy,
    complete,
    free_port,
    label_server,
    running,
    write_brain,
    write_ct,
)
from playwright.sync_api import Page
from pydicom.uid import CTImageStorage, generate_uid

from conftest import NAME, ORGANS, ROOT
from scripts.data.dicom import ordered_series
from scripts.organs.structures import catalogue

REAL_CT = ROOT.parent / "shared" / "data" / "totalsegmentator" / "example_ct_dicom"


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    """A phantom CT, a phantom brain with four series, one without FLAIR, and a real CT if there is one."""
    folder = tmp_path_factory.mktemp("studies")
    write_ct(folder / "torso" / "ct")
    write_brain(folder / "brain")
    write_brain(folder / "incomplete", {name: DESCRIPTIONS[name] for name in ("t1", "t1ce", "t2")}, "incomplete")
    if REAL_CT.is_dir():
        study, series, frame = generate_uid(), generate_uid(), generate_uid()
        (folder / "real").mkdir()
        for number, file in enumerate(sorted(REAL_CT.iterdir())):  # published without UIDs, which Orthanc refuses
            image = pydicom.dcmread(file)
            image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame
            image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = CTImageStorage
            image.save_as(folder / "real" / f"{number}.dcm")
        complete(folder / "real", "real", Modality="CT", SeriesDescription="real CT")
    return folder


@pytest.fixture(scope="module")
def archive(studies, tmp_path_factory):
    """Orthanc that holds the studies."""
    own = Archive(tmp_path_factory.mktemp("archive") / "orthanc")
    with own.running():
        own.put_all(studies)
        yield own


@pytest.fixture(scope="module")
def proxy(archive):
    """A way to the archive that can fail."""
    own = Proxy(archive)
    threading.Thread(target=own.serve_forever, daemon=True).start()
    yield own
    own.shutdown()


@pytest.fixture(scope="module")
def process(archive, proxy, tmp_path_factory):
    """A MONAI Label with the archive as its studies: its process, and its folder for all that it writes."""
    folder, port = tmp_path_factory.mktemp("label"), free_port()
    start = label_server(proxy.web, archive.auth, folder, port)
    with running(folder, f"http://127.0.0.1:{port}/ohif/", **start) as found:
        found.folder, found.url = folder, f"http://127.0.0.1:{port}"
        yield found


@pytest.fixture
def server(process):
    """Address of the server."""
    return process.url


def ask(server: str, model: str, image: str, /, **params) -> requests.Response:
    url = f"{server}/infer/{model}?image={image}&output=json"
    return requests.post(url, files={"params": (None, json.dumps(params))}, timeout=120)


def on_the_command_line(configs: list[str], folder: Path, out: Path) -> nib.Nifti1Image:
    """The mask that the bundle writes for a study."""
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(configs)]
    subprocess.run([*command, "--dataset_dir", str(folder), "--output_dir", str(out)], cwd=ROOT, check=True)
    (file,) = out.glob("*_seg.nii.gz")
    return nib.load(file)


def segments(archive: Archive, uid: str, series: Path) -> dict[str, np.ndarray]:
    """Masks ``[H, W, S]`` of a stored segmentation on the slices of a series, by their names."""
    found = archive.instance(uid)
    segmentation = highdicom.seg.Segmentation.from_dataset(found)
    images = [pydicom.dcmread(image.file) for image in ordered_series(str(next(series.iterdir())))]
    uids = [image.SOPInstanceUID for image in images]
    pixels = segmentation.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    labels = [segmentation.get_segment_description(number).segment_label for number in segmentation.segment_numbers]
    return {label: pixels[..., index].transpose(2, 1, 0) for index, label in enumerate(labels)}


def test_a_study_of_four_series_is_found_from_any_of_them(server, archive, studies, tmp_path):
    uids, volumes = archive.series(PatientID="brain"), []
    for description in DESCRIPTIONS.values():
        answer = ask(server, NAME, uids[description])
        assert answer.status_code == 200, answer.text
        assert answer.json()["series"] == DESCRIPTIONS
        volumes.append(answer.json()["volume_expected_ml_WT"])
    assert len(set(volumes)) == 1
    mask = np.asarray(on_the_command_line(["configs/inference.yaml"], studies / "brain", tmp_path).dataobj)
    stored = ask(server, NAME, uids["Ax T1"], store=True).json()["stored"]
    masks = segments(archive, stored["seg"], studies / "brain" / "t1")
    for region, values in {"TC": (1, 4), "WT": (1, 2, 4), "ET": (4,)}.items():
        assert mask.any()
        np.testing.assert_array_equal(masks[region], np.isin(mask, values))


def test_the_report_of_a_tumour_is_read_back(server, archive):
    answer = ask(server, NAME, archive.series(PatientID="brain")["Ax T2 FLAIR"], store=True).json()
    report = highdicom.sr.Comprehensive3DSR.from_dataset(archive.instance(answer["stored"]["sr"]))
    groups = report.content.get_volumetric_roi_measurement_groups()
    assert [group.tracking_identifier for group in groups] == ["TC", "WT", "ET"]
    for group in groups:
        region = group.tracking_identifier
        volume, dice = group.get_measurements()
        assert volume.value == pytest.approx(answer[f"volume_expected_ml_{region}"], rel=1e-4)
        assert dice.value == pytest.approx(answer[f"expected_dice_{region}"], rel=1e-4)
        distances = [float(part.MeasuredValueSequence[0].NumericValue) for part in volume[0].ContentSequence]
        ends = [answer[f"volume_{end}_ml_{region}"] for end in ("low", "high")]
        assert sorted(distances) == pytest.approx(sorted(abs(volume.value - end) for end in ends), rel=1e-3)


@pytest.mark.parametrize("store", [False, True])
def test_an_incomplete_study_is_refused_with_the_reason(server, archive, store):
    answer = ask(server, NAME, archive.series(PatientID="incomplete")["Ax T1"], store=store)
    assert answer.status_code == 422
    assert "the study has no series for modality 'flair' among ['Ax T" in answer.json()["detail"]


def test_series_on_different_grids_are_refused(server, archive, studies, tmp_path):
    write_brain(tmp_path, patient="shifted")
    for file in (tmp_path / "t2").iterdir():
        image = pydicom.dcmread(file)
        image.PixelSpacing = [2.0, 2.0]
        image.save_as(file)
    archive.put_all(tmp_path)
    answer = ask(server, NAME, archive.series(PatientID="shifted")["Ax T1"])
    assert answer.status_code == 422
    assert "t2" in answer.json()["detail"]


@pytest.mark.parametrize("image", ["1.2.3", "1" * 300, "../../etc", "%2e%2e%2fmodels", "*", "1.2.3&StudyInstanceUID=1"])
def test_unknown_and_hostile_series_are_not_found(server, image):
    answer = ask(server, NAME, image)
    assert answer.status_code == 404
    assert "no series" in answer.json()["detail"]


def test_store_needs_an_archive_that_takes_it(server, archive):
    assert ask(server, ORGANS, archive.series(PatientID="torso")["CT phantom"], store="yes").status_code == 422
    synthesis = ask(server, "ncct_to_cta_synthesis", archive.series(PatientID="torso")["CT phantom"], store=True)
    assert synthesis.status_code == 422
    assert "makes no DICOM segmentations" in synthesis.json()["detail"]


def test_corrected_masks_are_refused_with_the_reason(server, archive):
    url = f"{server}/datastore/label?image={archive.series(PatientID='brain')['Ax T1']}&tag=final"
    answer = requests.put(url, files={"params": (None, "{}"), "label": ("mask.nii.gz", b"mask")}, timeout=30)
    assert answer.status_code == 422
    assert "takes no corrected masks" in answer.json()["detail"]


@pytest.mark.parametrize("params", [{"image": ["a"]}, {"volume": []}, {"logging": 5}, {"logging": "$import os"}])
def test_options_of_the_wrong_type_are_refused(server, archive, params):
    answer = ask(server, NAME, archive.series(PatientID="brain")["Ax T1"], **params)
    assert answer.status_code == 422, answer.text


def test_training_is_not_offered(server):
    assert requests.get(f"{server}/info/", timeout=30).json()["trainers"] == {}


def test_the_next_study_has_no_segmentation_yet(server, archive, tmp_path):
    """Of the brains with four series, one is stored; CTs and incomplete studies are not asked for."""
    ask(server, NAME, archive.series(PatientID="brain")["Ax T1"], store=True)
    write_brain(tmp_path, patient="next", slices=4)
    archive.put_all(tmp_path)
    asked = requests.post(f"{server}/activelearning/uncertainty", json={}, timeout=300).json()
    assert asked["id"] in archive.series(PatientID="next").values() or asked["PatientID"].startswith("new-")


def test_the_label_map_of_a_real_ct(server, archive, studies, tmp_path):
    if not REAL_CT.is_dir():
        pytest.skip(f"no {REAL_CT}")
    answer = ask(server, ORGANS, archive.series(PatientID="real")["real CT"], store=True)
    assert answer.status_code == 200, answer.text
    mask = on_the_command_line(["bundles/organs/configs/inference.yaml"], studies / "real", tmp_path)
    found = segments(archive, answer.json()["stored"]["seg"], studies / "real")
    compare_structures(found, np.asarray(mask.dataobj))


def compare_structures(masks: dict[str, np.ndarray], labels: np.ndarray) -> None:
    """Each segment is a structure of the label map, and none is left out."""
    numbers = {entry["name"]: entry["number"] for entry in catalogue().values()}
    assert {numbers[name] for name in masks} == set(np.unique(labels).tolist()) - {0}
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, labels == numbers[name])


@contextlib.contextmanager
def viewer(browser, server: str):
    """OHIF with its study list."""
    page = browser.new_page(viewport={"width": 1500, "height": 900})
    page.set_default_timeout(120_000)  # other tests may run beside
    # the page asks for fonts that it does without
    page.route(lambda url: "127.0.0.1" not in url, lambda route: route.abort())
    page.goto(f"{server}/ohif/")
    page.get_by_text("Confirm and Hide").click()
    yield page
    page.close()


def open_panel(page: Page, patient: str, server: str) -> None:
    """Open the study of a patient with the panel of MONAI Label, and connect it to the server."""
    page.get_by_text(f"Phantom, {patient}").or_(page.get_by_text(f"{patient}, Phantom")).first.click()
    page.get_by_role("button", name="MONAI Label").first.click()
    page.locator("#monailabelServerURL").fill(f"{server}/")
    page.get_by_text("(33/64)").or_(page.get_by_text("(17/32)")).first.wait_for()  # the volume is loaded
    page.locator(".settingsTable button").click()
    page.get_by_text("Auto-Segmentation").wait_for()


def segment(page: Page, model: str) -> None:
    """Run a model in the first part of the panel, *Auto-Segmentation*."""
    models = page.locator(".monaiLabelPanel select", has=page.locator(f"option[value={model}]"))
    models.first.select_option(model)
    models.last.select_option(model)  # of *Class Prompts*, which lists the structures
    page.locator(".monaiLabelPanel button:visible", has_text="Run").first.click()


def test_a_viewer_segments_and_stores(browser, server, archive, studies, tmp_path):
    before = set(archive.series(PatientID="torso", Modality="SEG").values())
    with viewer(browser, server) as page:
        open_panel(page, "torso", server)
        page.get_by_text("Options / Configurations").click()
        page.locator("select[name=selectName]").select_option(ORGANS)
        page.locator(f"#infer{ORGANS}store").check()
        page.get_by_role("button", name="Confirm").click()
        segment(page, ORGANS)
        page.get_by_text("Running Segmentation - Successful").wait_for(timeout=120_000)
        page.wait_for_timeout(3000)  # it is drawn
        names = page.locator(".monaiLabelPanel").inner_text()
        assert "liver" in names
        assert "kidney_left" in names
        shot = page.screenshot(path=tmp_path / "ohif.png")
        assert len(shot) > 50_000
    new = set(archive.series(PatientID="torso", Modality="SEG").values()) - before
    assert len(new) == 1
    found = archive.session.get(f"{archive.web}/instances", params={"SeriesInstanceUID": new.pop()}).json()
    masks = segments(archive, found[0]["00080018"]["Value"][0], studies / "torso" / "ct")
    labels = on_the_command_line(["bundles/organs/configs/inference.yaml"], studies / "torso", tmp_path)
    compare_structures(masks, np.asarray(labels.dataobj))


def test_a_viewer_says_that_it_failed_and_the_log_why(browser, server):
    with viewer(browser, server) as page:
        open_panel(page, "incomplete", server)
        segment(page, NAME)
        page.get_by_text("Failed to Run Segmentation").wait_for(timeout=60_000)
    log = requests.get(f"{server}/logs/?lines=200&text=true", timeout=30).text
    assert "no series for modality 'flair'" in log


@pytest.fixture
def new_study(archive, tmp_path):
    """A brain of four slices that the server has not seen yet: UID of a series."""
    patient = f"new-{generate_uid()[-8:]}"
    write_brain(tmp_path / "new", patient=patient, slices=4)
    archive.put_all(tmp_path / "new")
    return archive.series(PatientID=patient)["Ax T1"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("gone", "does not answer"),
        ("truncated", "the archive http://127.0.0.1"),
        ("no pixels", "an image without all of its pixels"),
        ("path as UID", "the archive sent '../../../escaped', which is no UID"),
    ],
)
def test_a_failing_archive_is_named_and_nothing_is_kept(process, proxy, new_study, fault, message):
    proxy.fault = fault
    try:
        answer = ask(process.url, NAME, new_study)
    finally:
        proxy.fault = None
    assert answer.status_code == 502
    assert message in answer.json()["detail"]
    assert not list(process.folder.rglob(f"series/{new_study}"))
    assert not list(process.folder.rglob(".partial_*"))
    assert not list(process.folder.rglob("escaped*"))
    assert ask(process.url, NAME, new_study).status_code == 200  # when the archive is well again


def test_a_slow_archive_is_waited_for(process, proxy, archive, tmp_path):
    write_ct(tmp_path, "slow", slices=4)
    archive.put_all(tmp_path)
    proxy.fault = "slow"
    try:
        answer = ask(process.url, ORGANS, archive.series(PatientID="slow")["CT phantom"])
    finally:
        proxy.fault = None
    assert answer.status_code == 200


def test_a_wrong_password_is_told(archive, tmp_path):
    port = free_port()
    start = label_server(archive.web, ("label", "wrong"), tmp_path, port)
    with running(tmp_path, f"http://127.0.0.1:{port}/ohif/", **start):
        answer = ask(f"http://127.0.0.1:{port}", NAME, archive.series(PatientID="brain")["Ax T1"])
    assert answer.status_code == 502
    assert "401" in answer.json()["detail"]


def test_killed_while_it_segments(server, archive, new_study, tmp_path):
    """A server that is started again with the same folder answers as if nothing had been."""
    port = free_port()
    start, url = label_server(archive.web, archive.auth, tmp_path, port), f"http://127.0.0.1:{port}"
    with running(tmp_path, f"{url}/ohif/", **start) as process, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, url, NAME, new_study)
        wait_for(lambda: list(tmp_path.rglob(f"series/{new_study}")) or answer.done())
        process.kill()
        with pytest.raises(requests.ConnectionError):
            answer.result(60)
    with running(tmp_path, f"{url}/ohif/", **start):
        again = ask(url, NAME, new_study).json()
    expected = ask(server, NAME, new_study).json()
    assert again["volume_expected_ml_WT"] == expected["volume_expected_ml_WT"]
    assert again["series"] == DESCRIPTIONS


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_without_a_token_nothing_is_answered(archive, tmp_path):
    port = free_port()
    start = label_server(archive.web, archive.auth, tmp_path, port, MONAI_LABEL_AUTH_ENABLE="true")
    url = f"http://127.0.0.1:{port}"
    with running(tmp_path, f"{url}/ohif/", **start):
        paths = ("info/", "datastore/", "train/", "ohif/", "proxy/dicom/qido/studies", "logs/")
        answers = {path: requests.get(f"{url}/{path}", timeout=30).status_code for path in paths}
        answers["infer"] = ask(url, NAME, archive.series(PatientID="brain")["Ax T1"]).status_code
    assert set(answers.values()) == {401}, answers


def test_many_requests_leave_nothing_behind(process, archive, new_study):
    """200 requests, four at a time, good and hostile: all are answered, and memory and files are as before."""
    brain, incomplete = new_study, archive.series(PatientID="incomplete")["Ax T1"]
    requests_ = [
        (200, brain, {}),
        (422, incomplete, {}),
        (404, "../../etc/passwd", {}),
        (422, brain, {"sampler": "$import os"}),
        (422, brain, {"num_samples": 10**9}),
    ]

    def temporary() -> set[Path]:
        return {path for path in process.folder.rglob("*") if path.is_file() and "cache" not in path.parts}

    def run(count: int) -> list[tuple[int, int]]:
        with ThreadPoolExecutor(4) as pool:
            wanted = [requests_[i % len(requests_)] for i in range(count)]
            answers = pool.map(lambda one: ask(process.url, NAME, one[1], **one[2]).status_code, wanted)
        return [(expected, found) for (expected, _, _), found in zip(wanted, answers, strict=True)]

    tree = psutil.Process(process.pid)
    run(20)  # libraries are imported, allocators have grown
    before, files = tree.memory_info().rss, temporary()
    pairs = run(200)
    after = tree.memory_info().rss
    print(f"\n200 requests: {before / 2**20:.0f} MB before, {after / 2**20:.0f} MB after")
    assert all(expected == found for expected, found in pairs), sorted(set(pairs))
    assert after < 1.1 * before
    assert temporary() <= files
