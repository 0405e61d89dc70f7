"""``report.html`` in a browser. Run by `make clinic-test`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page

from conftest import ROOT, make_phantoms

HOSTILE = "<script>alert(1)"
BUNDLE = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """The pages of an evaluation and of an inference of four phantoms, one of which has a hostile name."""
    folder = tmp_path_factory.mktemp("reports")
    phantoms = make_phantoms(folder / "data", 4, 48, 48, 16)
    old = phantoms / "BraTS20_Training_002"
    for file in old.iterdir():
        file.rename(file.with_name(file.name.replace(old.name, HOSTILE)))
    old.rename(phantoms / HOSTILE)
    table = phantoms / "name_mapping.csv"
    table.write_text(table.read_text().replace(old.name, HOSTILE))
    runs = {
        "inference": ["configs/inference.yaml"],
        "evaluation": ["['configs/train.yaml','configs/weights.yaml','configs/evaluate.yaml']", "--subset", "all"],
    }
    for name, (config, *options) in runs.items():
        own = ["--dataset_dir", phantoms, "--output_dir", folder / name, "--ckpt_path", "models/model.pt"]
        subprocess.run([*BUNDLE, config, *options, *map(str, own), "--num_samples", "2"], cwd=ROOT, check=True)
    return {name: folder / name / "report.html" for name in runs}


@pytest.fixture
def opened(browser, reports):
    """Function that opens a page of ``reports``. What the browser complains of, asks for or pops up fails the test."""
    complaints: list[str] = []

    def open_page(name: str, **options) -> Page:
        page = browser.new_page(**{"viewport": {"width": 1300, "height": 900}} | options)
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        own = reports[name].as_uri()
        page.on("request", lambda sent: sent.url.startswith(("data:", own)) or complaints.append(f"asks {sent.url}"))
        page.goto(own)
        page.wait_for_selector("#layers input")
        return page

    yield open_page
    assert not complaints


def names(page: Page) -> list[str]:
    return page.locator("#subjects tbody button").all_inner_texts()


def position(page: Page) -> int:
    return int(page.locator("#position").inner_text().split()[0])


def picture(page: Page) -> str:
    return page.evaluate("document.getElementById('canvas').toDataURL()")


@pytest.mark.parametrize("name", ["inference", "evaluation"])
def test_subjects_are_sorted_by_any_column_and_searched(opened, name):
    page = opened(name)
    assert len(names(page)) == 4
    head = page.locator("#subjects thead button")
    column = 1 + page.evaluate("data.columns.findIndex((title) => title.startsWith('expected Dice'))")
    values = []
    for _ in range(2):
        head.nth(column).click()
        values.append([float(v) for v in page.locator(f"#subjects tbody td:nth-child({column + 1})").all_inner_texts()])
    assert values[0] == sorted(values[0])
    assert values[1] == values[0][::-1]
    assert page.locator("#subjects thead th").nth(column).get_attribute("aria-sort") == "descending"
    page.locator("#search").fill("training_003")
    assert names(page) == ["BraTS20_Training_003"]


def test_a_hostile_name_is_text(opened):
    page = opened("evaluation")
    page.get_by_role("button", name=HOSTILE).click()
    assert page.locator("#viewer-title").inner_text() == HOSTILE
    assert HOSTILE in names(page)


def test_slices_and_layers_by_mouse_and_keyboard(opened):
    page = opened("evaluation")
    first, start = picture(page), position(page)
    page.locator("#canvas").hover()
    page.mouse.wheel(0, 100)
    page.wait_for_function(f"slice === {start}")
    assert picture(page) != first
    page.keyboard.press("ArrowDown")
    assert position(page) == start
    assert picture(page) == first
    for key, name in (("m", "mask"), ("t", "truth"), ("u", "uncertainty"), ("s", "samples")):
        before = page.locator(f"#show-{name}").is_checked()
        page.keyboard.press(key)
        assert page.locator(f"#show-{name}").is_checked() is not before
        assert picture(page) != first
        page.keyboard.press(key)
        assert picture(page) == first
    page.keyboard.press("n")
    page.wait_for_function(f"document.getElementById('viewer-title').textContent !== {names(page)[0]!r}")
    assert page.locator("tr[aria-selected=true] button").inner_text() == names(page)[1]


def test_learning_curves_and_scores_are_there(opened):
    page = opened("evaluation")
    assert page.locator("section.plot img").count() >= 2
    assert page.get_by_text("WT dice mean").is_visible()
    command = page.get_by_role("row", name="command").inner_text()
    assert "-m monai.bundle run" in command


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(opened, scheme):
    page = opened("evaluation", color_scheme=scheme)
    for selector in ("body", "tr[aria-selected=true]", "#subjects thead th"):
        assert contrast(page, selector) >= 7  # AAA of WCAG 2


def contrast(page: Page, selector: str) -> float:
    """Contrast of the text of an element to what lies behind it (WCAG 2)."""
    colours = page.evaluate(
        """(selector) => {
            const own = document.querySelector(selector);
            let behind = own;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            return [getComputedStyle(own).color, getComputedStyle(behind).backgroundColor]
                .map((text) => text.match(/[0-9]+/g).slice(0, 3).map(Number));
        }""",
        selector,
    )

    def luminance(colour: list[int]) -> float:
        parts = [value / 255 for value in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)
