"""The viewer: its volumes against the images, and the whole page in headless Chromium."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jrs.fields import DisplacementField
from jrs.geometry import Geometry
from jrs.resources import DATA
from jrs.runtime import report_html
from jrs.runtime.report_html import drawings
from jrs.runtime.report_viewer import NIIVUE, SPACING_MM, viewer, viewer_grid
from jrs.volume import Volume

CENTER = np.array([3.0, -4.0, 20.0])
TUMOR = CENTER + np.array([14.0, 6.0, -8.0])


def grid(orientation: str = "LPS", spacing: float = 2.0) -> Geometry:
    n = int(96 / spacing)
    return Geometry.aligned((n, n + 4, n - 4), (spacing,) * 3, CENTER, orientation)


def points(of: Geometry) -> np.ndarray[Any, Any]:
    return of.to_ras(np.moveaxis(np.indices(of.shape), 0, -1))


def ball(at: np.ndarray[Any, Any], center: np.ndarray[Any, Any], radius: float) -> np.ndarray[Any, Any]:
    return np.linalg.norm(at - center, axis=-1) <= radius


def image(at: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A ball that is brighter to the right, with a smooth texture."""
    inside = ball(at, CENTER, 34.0)
    bright = 100.0 + 1.5 * (at[..., 0] - CENTER[0]) + 10.0 * np.cos(at[..., 1] / 5.0)
    return np.where(inside, bright, 0.0).astype(np.float32)


def labels(at: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(ball(at, TUMOR, 10.0), 4, 0).astype(np.uint8)


def blocks(html: str) -> dict[str, str]:
    return dict(re.findall(r'<script type="text/plain" id="([\w-]+)">([^<]*)</script>', html))


def volume(html: str, name: str) -> Any:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(blocks(html)[f"volume-{name}"])))


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "SAL"])
def test_volumes_are_the_images_in_the_world(orientation: str) -> None:
    where = grid(orientation)
    at = points(where)
    jacobian = np.full(where.shape, 2.0, dtype=np.float32)
    html = viewer(Volume(image(at), where), image(at), labels(at), jacobian, np.diag([1.0, 1.0, 1.0, 1.0]))
    shown = volume(html, "atlas")
    assert nib.aff2axcodes(shown.affine) == ("R", "A", "S")
    assert shown.get_data_dtype() == np.uint8
    there = nib.affines.apply_affine(shown.affine, np.moveaxis(np.indices(shown.shape), 0, -1))
    data, want = np.asarray(shown.dataobj).astype(float), image(there)
    inner = ball(there, CENTER, 30.0)
    slope, offset = np.polyfit(want[inner], data[inner], 1)
    unclipped = inner & (data > 0) & (data < 255)
    assert np.abs(data - (slope * want + offset))[unclipped].max() < 6.0
    assert data[~ball(there, CENTER, 37.0)].max() == 0.0
    # Labels keep their number and their place.
    numbers = np.asarray(volume(html, "labels").dataobj)
    assert set(np.unique(numbers)) == {0, 4}
    np.testing.assert_allclose(there[numbers == 4].mean(axis=0), TUMOR, atol=0.7)
    assert (numbers == 4).sum() * np.prod(shown.header.get_zooms()) == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.1)
    # A determinant of 2 under an affine of 1: half the volume, -1 as a binary logarithm; nothing outside the brain.
    change = volume(html, "change")
    mapped = np.asarray(change.dataobj)
    middle = np.rint(nib.affines.apply_affine(np.linalg.inv(change.affine), CENTER)).astype(int)
    assert mapped[tuple(middle)] == pytest.approx(-1.0, abs=0.01) and mapped[0, 0, 0] == 0.0
    np.testing.assert_allclose(json.loads(blocks(html)["center"]), TUMOR, atol=0.7)


def test_an_oblique_atlas_is_shown_upright(helpers: Any) -> None:
    where = Geometry((50, 52, 48), helpers.grid_affine((50, 52, 48), codes="LPS", degrees=(9, -7, 12), center=CENTER))
    shown = volume(viewer(Volume(image(points(where)), where), image(points(where)), None, None, np.eye(4)), "moved")
    there = nib.affines.apply_affine(shown.affine, np.moveaxis(np.indices(shown.shape), 0, -1))
    bright = np.asarray(shown.dataobj) > 0
    np.testing.assert_allclose(there[bright].mean(axis=0), CENTER, atol=1.0)


def test_what_is_not_there_is_left_out() -> None:
    where = grid()
    html = viewer(Volume(image(points(where)), where), image(points(where)), None, None, np.eye(4))
    assert {key for key in blocks(html) if key.startswith("volume-")} == {"volume-atlas", "volume-moved"}
    assert 'id="labels"' not in html and 'id="change"' not in html and 'id="blend"' in html


@pytest.mark.parametrize(("side", "spacing"), [(96, 2.0), (480, 8.0)])
def test_the_grid_covers_the_brain_and_stays_small(side: int, spacing: float) -> None:
    n = int(side / spacing)
    where = Geometry.aligned((n, n, n), (spacing,) * 3, CENTER, "LPS")
    inside = ball(points(where), CENTER, 0.4 * side)
    found = viewer_grid(Volume(inside.astype(np.float32), where))
    low, high = found.to_ras(np.zeros(3)), found.to_ras(np.array(found.shape) - 1)
    assert (low < CENTER - 0.4 * side + spacing).all() and (high > CENTER + 0.4 * side - spacing).all()
    assert np.prod(found.shape) < 3_300_000
    assert found.spacing[0] >= SPACING_MM - 1e-9


def test_an_empty_image_gives_a_viewer() -> None:
    where = grid(spacing=8.0)
    empty = np.zeros(where.shape, dtype=np.float32)
    html = viewer(Volume(empty, where), empty, empty.astype(np.uint8), empty, np.eye(4))
    assert not np.asarray(volume(html, "atlas").dataobj).any()


def test_niivue_is_the_file_that_its_licence_names() -> None:
    code = gzip.decompress((DATA / "report" / "niivue.umd.js.gz").read_bytes())
    licence = (DATA / "report" / "LICENSE_NIIVUE.txt").read_text(encoding="utf-8")
    assert hashlib.sha256(code).hexdigest() in licence
    assert f"NiiVue {NIIVUE}" in licence and "Redistribution and use in source and binary forms" in licence
    assert NIIVUE in code.decode()


# In a browser ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = grid()
    at = points(where)
    d = np.zeros((3, *where.shape), dtype=np.float32)
    d[0] = 2.0
    report = {
        **{"case": "case-1", "atlas": "phantom", "warnings": [], "timings_s": {"total": 1.0}},
        "volume_verdict": {"answer": "kept", "kept_percent": 99.0, "text": "No: it is there."},
    }
    native = Volume(image(at), where)
    jacobian = np.full(where.shape, 1.2, dtype=np.float32)
    on_the_atlas = native, image(at), labels(at)
    drawn = drawings(native, labels(at), *on_the_atlas, DisplacementField(d, where), np.eye(4), "t1", jacobian)
    text = report_html.page(report, np.eye(4), drawn, viewer(*on_the_atlas, jacobian, np.eye(4)))
    assert len(text) < 15_000_000
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-quic", "--no-first-run", "--window-size=1200,900"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
WEBGL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page in headless Chromium with the flags given, and returns the driver."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    opened = []

    def start(path: Path, *flags: str) -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, *flags, f"--user-data-dir={tmp_path / 'profile'}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(executable_path=driver)
        opened.append(webdriver.Chrome(options=options, service=service))
        opened[-1].get(path.as_uri())
        return opened[-1]

    yield start
    for one in opened:
        one.quit()


def wait(driver: Any, condition: str, seconds: float = 90.0) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, seconds, 0.2).until(lambda d: d.execute_script(f"return {condition}"))


def messages(driver: Any) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.mark.slow
def test_chromium_opens_the_page_without_an_error(browser: Callable[..., Any], page: Path) -> None:
    driver = browser(page, *WEBGL)
    driver.execute_script("document.getElementById('viewer-section').scrollIntoView()")
    wait(driver, "document.getElementById('viewer-section').dataset.ready === 'yes'")
    assert driver.execute_script("return document.getElementById('viewer-note').hidden")
    # The crosshair stands on the tumour, and the viewer says what is there.
    place = driver.find_element("id", "place").text
    x, y, z = (float(v) for v in re.findall(r"-?\d+\.\d", place)[:3])
    np.testing.assert_allclose((x, y, z), TUMOR, atol=1.5)
    assert "label Enhancing" in place or "label 4" in place
    shot = driver.find_element("id", "canvas").screenshot_as_png
    assert brain_and_tumor(shot)
    for control, value in (("view", 0), ("view", 4), ("view", 3), ("blend", 30), ("labels", 80), ("change", 50)):
        driver.execute_script(
            "const c = document.getElementById(arguments[0]); c.value = arguments[1]; c.oninput();", control, value
        )
    driver.find_element("id", "outline").click()
    # The slider needs no WebGL: three copies of the moved pictures over the atlas's.
    assert driver.execute_script("return document.querySelectorAll('.slider img.over').length") == 3
    assert messages(driver) == []
    loaded = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith(("data:", "blob:"))] == []


def brain_and_tumor(png: bytes) -> bool:
    """Whether a screenshot of the viewer has a grey brain and the vermilion of enhancing tumour."""
    import io

    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    spread = pixels.max(axis=-1) - pixels.min(axis=-1)
    grey = (spread < 8) & (pixels[..., 0] > 60)
    red = (pixels[..., 0] - pixels[..., 2] > 60) & (pixels[..., 0] > 150)
    return bool(grey.sum() > 5000 and red.sum() > 100)


@pytest.mark.slow
def test_without_webgl_the_rest_of_the_page_is_there(browser: Callable[..., Any], page: Path) -> None:
    driver = browser(page, "--disable-gpu", "--disable-3d-apis")
    driver.execute_script("document.getElementById('viewer-section').scrollIntoView()")
    note = "document.getElementById('viewer-note')"
    wait(driver, f"{note}.textContent.startsWith('No interactive viewer')")
    assert not driver.find_element("id", "viewer").is_displayed()
    assert driver.find_element("id", "viewer-note").is_displayed()
    assert "No: it is there." in driver.find_element("tag name", "main").text
    assert driver.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert driver.execute_script("return document.images.length") == 8 * 3 + 6
    assert messages(driver) == []
