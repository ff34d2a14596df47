"""The HTML report: its pictures against geometry, its words, and that it stands alone."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from jrs.fields import DisplacementField
from jrs.geometry import FloatArray, Geometry, apply_affine
from jrs.runtime import report_html
from jrs.runtime.measures import volume_verdict
from jrs.runtime.report_pictures import CHECK_MM, CLASSES, GRID_MM, Sparse, _closed
from jrs.volume import Volume

PLANES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
ROWS = {"case", "atlas", "moved", "grid", "jacobian", "blend", "checker", "length"}
RADII = np.array([30.0, 38.0, 26.0])
CENTER = np.array([-4.0, 12.0, 20.0])  # of the case's brain
TUMOR = CENTER + np.array([10.0, 12.0, 8.0])  # right, anterior, superior
TUMOR_MM = 9.0
BLOB = CENTER + np.array([-14.0, 12.0, 8.0])  # left, in the tumour's axial and coronal planes
SCALE, SHIFT = 1.1, np.array([3.0, -5.0, 7.0])
AFFINE = np.diag([SCALE, SCALE, SCALE, 1.0])
AFFINE[:3, 3] = SHIFT
VOLUMES: dict[str, dict[str, float]] = {
    "native": {"WT": 30.0, "TC": 10.0, "ET": 0.0},
    "affine": {"WT": 22.54, "TC": 7.513, "ET": 0.0},  # by 1.1^3
    "moved": {"WT": 22.5, "TC": 7.0, "ET": 0.0},
}
VOID = {"img", "meta", "br", "link", "hr", "input"}


def to_fixed(point: FloatArray) -> FloatArray:
    return (point - SHIFT) / SCALE


def oblique(orientation: str = "LAS", degrees: float = 25.0) -> Geometry:
    """A grid around the case's brain, turned about two axes of the world."""
    a, b = np.radians([degrees, degrees / 2.0])
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    straight = Geometry.aligned((80, 90, 60), (1.2, 1.1, 1.5), (0.0, 0.0, 0.0), orientation)
    rotation = np.eye(4)
    rotation[:3, :3] = turn @ tilt
    rotation[:3, 3] = CENTER
    return Geometry(straight.shape, rotation @ straight.affine)


def points(grid: Geometry) -> FloatArray:
    return grid.to_ras(np.moveaxis(np.indices(grid.shape), 0, -1))


def case_image(at: FloatArray) -> npt.NDArray[np.float32]:
    """The case's brain with a bright blob on its left, at points of its world."""
    return brain(at, CENTER, RADII) + 200.0 * (np.linalg.norm(at - BLOB, axis=-1) <= 7.0).astype(np.float32)


def brain(at: FloatArray, center: FloatArray, radii: FloatArray) -> npt.NDArray[np.float32]:
    """An ellipsoid, brighter inside."""
    r2 = (((at - center) / radii) ** 2).sum(axis=-1)
    return np.where(r2 <= 1.0, 100.0 - 60.0 * r2, 0.0).astype(np.float32)


def case_labels(at: FloatArray, enhancing: int = 4) -> npt.NDArray[np.uint8]:
    distance = np.linalg.norm(at - TUMOR, axis=-1)
    shells = [distance <= 3, distance <= 6, distance <= TUMOR_MM]
    return np.select(shells, [1, enhancing, 2], 0).astype(np.uint8)


@dataclass
class Inputs:
    report: dict[str, Any]
    native: Volume
    native_labels: npt.NDArray[np.uint8] | None
    fixed: Volume
    moved: npt.NDArray[np.float32]
    moved_labels: npt.NDArray[np.uint8] | None
    field: DisplacementField | None
    affine: FloatArray
    modality: str = "t1"
    jacobian: npt.NDArray[np.float32] | None = None

    def page(self) -> Page:
        report, *others = self.__dict__.values()
        text = report_html.page(report, self.affine, report_html.drawings(*others), "")
        parser = Page(text)
        parser.feed(text)
        parser.close()
        assert not parser.open, parser.open
        return parser


class Page(HTMLParser):
    """Fails on a tag that is not closed in order; keeps text, tags and pictures."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"{tag} at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words += data + "\n"

    def image(self, row: str, plane: str) -> dict[str, str | None]:
        found = [a for tag, a in self.tags if tag == "img" and a["data-picture"] == f"{row}-{plane}"]
        assert len(found) == 1, (row, plane)
        return found[0]

    def pixels(self, row: str, plane: str) -> npt.NDArray[np.uint8]:
        source = self.image(row, plane)["src"] or ""
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture)

    def origin(self, row: str, plane: str) -> FloatArray:
        return np.array([float(v) for v in (self.image(row, plane)["data-origin"] or "").split(",")])

    def rows(self) -> set[str]:
        return {(a["data-picture"] or "").split("-")[0] for tag, a in self.tags if tag == "img"}


def atlas_grid() -> Geometry:
    return Geometry.aligned((60, 70, 56), (1.4, 1.4, 1.4), to_fixed(CENTER), "RPS")


def total_field(grid: Geometry, u: npt.ArrayLike = (0.0, 0.0, 0.0)) -> DisplacementField:
    """d(x) = A(x + u) - x for a constant u."""
    x = points(grid)
    d = apply_affine(AFFINE, x + np.asarray(u)) - x
    return DisplacementField(np.ascontiguousarray(np.moveaxis(d, -1, 0), dtype=np.float32), grid)


def inputs(native: Geometry | None = None, u: npt.ArrayLike = (0.0, 0.0, 0.0)) -> Inputs:
    native, grid = native or oblique(), atlas_grid()
    there = apply_affine(AFFINE, points(grid) + np.asarray(u))
    fixed = brain(points(grid), to_fixed(CENTER), RADII * 0.9)
    report: dict[str, Any] = {
        "case": "case-1",
        "atlas": "sri24",
        "bundle": {"name": "base", "sha256": "ab" * 32},
        "engine": {"backend": "onnxruntime", "device": "CPU", "precision": "fp32"},
        "modalities": ["t1", "flair"],
        "modalities_used": ["t1"],
        "label_scheme": "brats2018",
        "label_values": {"background": 0, "core": 1, "edema": 2, "enhancing_tumor": 4},
        "volumes_ml": VOLUMES,
        "volume_verdict": volume_verdict(VOLUMES),
        "jacobian": {
            **{"folding_percent": 0.01, "inside_tumor": 1.3, "outside_tumor": None},
            **{"inside": {"mean": 1.3, "sd": 0.123, "p5": 0.987, "p95": 1.765, "log_mean": 0.234}, "outside": None},
        },
        "similarity": {
            **{"modality": "t1", "before": 0.7, "after": 0.91},
            "modalities": {"t1": {"before": 0.7, "after": 0.91}, "t2": {"before": 0.345, "after": 0.456}},
        },
        "affine": AFFINE.tolist(),
        "timings_s": {"read": 0.5, "register": 2.0, "total": 2.5},
        "warnings": ["slices are thick"],
        "versions": {"jrs": "0.1.0"},
        "outputs": {"field": "case-1_xfm.nii.gz"},
    }
    return Inputs(
        report,
        Volume(case_image(points(native)), native),
        case_labels(points(native)),
        Volume(fixed, grid),
        case_image(there),
        case_labels(there, enhancing=3),
        total_field(grid, u),
        AFFINE,
        jacobian=np.full(grid.shape, SCALE**3, dtype=np.float32),
    )


@pytest.fixture(scope="module")
def page() -> Page:
    return inputs().page()


def outline(picture: npt.NDArray[np.uint8], name: str | None = None) -> npt.NDArray[np.bool_]:
    """Pixels that have exactly an outline's colour."""
    colors = [bytes.fromhex(c[1:]) for key, (_, c) in CLASSES.items() if name in (None, key)]
    return np.any([(picture == list(c)).all(axis=-1) for c in colors], axis=0)


def expected(point: FloatArray, center: FloatArray, shape: tuple[int, ...], plane: str) -> FloatArray:
    """Column and row of a point in a picture whose middle is ``center``; x, y and z fall along both."""
    middle = (np.array([shape[1], shape[0]]) - 1.0) / 2.0
    return middle - (point - center)[list(PLANES[plane])]


def span(mask: npt.NDArray[np.bool_]) -> tuple[FloatArray, FloatArray]:
    """Middle and length of what a mask covers, column and row."""
    rows, columns = np.nonzero(mask)
    low, high = np.array([columns.min(), rows.min()]), np.array([columns.max(), rows.max()])
    return (low + high) / 2.0, high - low + 1.0


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("row", ["case", "atlas", "moved"])
def test_tumor_outline_lies_where_geometry_says(page: Page, row: str, plane: str) -> None:
    # Both brains have the same centre on the atlas, so pictures are centred on it.
    scale = 1.0 if row == "case" else SCALE
    move = (lambda p: p) if row == "case" else to_fixed
    picture = page.pixels(row, plane)
    middle, length = span(outline(picture))
    want = expected(move(TUMOR), move(CENTER), picture.shape, plane)
    np.testing.assert_allclose(middle, want, atol=2.5)
    np.testing.assert_allclose(length, 2.0 * TUMOR_MM / scale, atol=3.0)
    assert want[0] < picture.shape[1] / 2 and want[1] < picture.shape[0] / 2  # right or anterior; superior
    # From the outside in: oedema, enhancing, core; the inner ones around the same middle.
    sizes = [span(outline(picture, name))[1].mean() for name in reversed(CLASSES)]
    assert sizes[1] > sizes[0] > span(outline(picture, next(iter(CLASSES))))[1].mean()


@pytest.mark.parametrize("plane", PLANES)
def test_origin_in_the_page_places_the_pixels(page: Page, plane: str) -> None:
    origin = page.origin("case", plane)
    columns, rows = PLANES[plane]
    middle, _ = span(outline(page.pixels("case", plane)))
    np.testing.assert_allclose(origin[[columns, rows]] - middle, TUMOR[[columns, rows]], atol=2.5)
    through = 3 - columns - rows
    assert abs(origin[through] - TUMOR[through]) < 1.0


@pytest.mark.parametrize("plane", ["axial", "coronal"])
@pytest.mark.parametrize("row", ["case", "moved"])
def test_patients_left_is_on_the_right(page: Page, row: str, plane: str) -> None:
    picture = page.pixels(row, plane)
    bright = (picture.min(axis=-1) > 250) & ~outline(picture)
    move = (lambda p: p) if row == "case" else to_fixed
    middle, _ = span(bright)
    assert middle[0] > picture.shape[1] / 2
    np.testing.assert_allclose(middle, expected(move(BLOB), move(CENTER), picture.shape, plane), atol=2.5)


def test_letters_follow_the_convention(page: Page) -> None:
    words = "".join(page.words.split())
    for letters in ("RLAP", "RLSI", "APSI"):
        assert letters in words


@pytest.mark.parametrize("plane", PLANES)
def test_storage_order_does_not_matter(plane: str) -> None:
    pictures, origins = [], []
    for grid in (oblique(), oblique("PIR", 0.0)):
        given = inputs(grid)
        given.native_labels = None
        shown = given.page()
        pictures.append(shown.pixels("case", plane)[:, :, 0].astype(int))
        origins.append(shown.origin("case", plane)[list(PLANES[plane])])
    shift = origins[0] - origins[1]
    assert np.abs(shift).max() <= 2.0  # the same brain, found on different grids
    columns, rows = np.rint(shift).astype(int)
    pictures[0] = np.roll(pictures[0], (-rows, -columns), axis=(0, 1))
    one, two = (p[20:-20, 15:-15] for p in pictures)
    height, width = np.minimum(one.shape, two.shape)
    difference = np.abs(one[:height, :width] - two[:height, :width])
    assert difference.mean() < 5.0 and np.median(difference) <= 4


@pytest.mark.parametrize("u", [(0.0, 0.0, 0.0), (3.0, -2.0, 1.0)])
@pytest.mark.parametrize("plane", PLANES)
def test_constant_displacement_moves_straight_grid_lines(plane: str, u: tuple[float, ...]) -> None:
    given = inputs(u=u)
    given.native_labels = given.moved_labels = None
    shown = given.page()
    bright = shown.pixels("grid", plane)[:, :, 0] > 140  # the dimmed atlas stays below
    origin = shown.origin("grid", plane)
    edge = 8  # lines moved in from outside the picture are not drawn
    inner = bright[edge:-edge, edge:-edge]
    columns, rows = inner.all(axis=0), inner.all(axis=1)
    assert np.array_equal(inner, columns[None, :] | rows[:, None])
    for axis, lines in zip(PLANES[plane], (columns, rows), strict=True):
        at = np.flatnonzero(lines) + edge
        assert at.size >= 4 and (np.diff(at) == GRID_MM).all()
        phase = (origin[axis] - at - u[axis]) % GRID_MM  # world coordinates of the lines before they moved
        assert (np.minimum(phase, GRID_MM - phase) <= 1.0).all()


def test_displacement_is_colored_by_its_length() -> None:
    shown = inputs(u=(0.0, 4.0, 0.0)).page()
    for plane in PLANES:
        picture = shown.pixels("length", plane)
        middle = picture[picture.shape[0] // 2, picture.shape[1] // 2]
        np.testing.assert_allclose(middle, (0xFD, 0xE7, 0x25), atol=2)
        assert not picture[0, 0].any()
    assert "At most 4.0 mm" in shown.words and "4 mm" in shown.words
    still = inputs().page().pixels("length", "axial")
    np.testing.assert_allclose(still[still.shape[0] // 2, still.shape[1] // 2], (0x44, 0x01, 0x54), atol=2)


def test_overlay_is_red_for_the_atlas_and_cyan_for_the_case(page: Page) -> None:
    picture, moved, atlas = (page.pixels(row, "coronal") for row in ("blend", "moved", "atlas"))
    plain = ~outline(moved)
    np.testing.assert_array_equal(picture[plain][:, 1:], moved[plain][:, 1:])
    np.testing.assert_array_equal(picture[plain][:, 0], atlas[plain][:, 0])


def test_volume_change_is_colored_from_half_to_twice() -> None:
    """|det A| / J: none is white, half the volume orange, twice blue; a fold magenta."""
    given = inputs()
    assert given.jacobian is not None
    for factor, color in ((1.0, (0xF7, 0xF7, 0xF7)), (2.0, (0xB2, 0x54, 0x1B)), (0.5, (0x1F, 0x5F, 0x99))):
        given.jacobian[:] = SCALE**3 * factor
        picture = given.page().pixels("jacobian", "axial")
        middle = picture[picture.shape[0] // 2, picture.shape[1] // 2]
        np.testing.assert_allclose(middle, color, atol=2)
        assert not picture[0, 0].any()
    given.jacobian[:] = -1.0
    picture = given.page().pixels("jacobian", "axial")
    assert tuple(picture[picture.shape[0] // 2, picture.shape[1] // 2]) == (255, 0, 255)


@pytest.mark.parametrize("plane", PLANES)
def test_checkerboard_takes_atlas_and_case_in_turn(plane: str) -> None:
    given = inputs()
    given.native_labels = given.moved_labels = None  # no outlines, which the checkerboard has not either
    shown = given.page()
    picture, atlas, moved = (shown.pixels(row, plane) for row in ("checker", "atlas", "moved"))
    assert not np.array_equal(atlas, moved)
    for row in range(0, picture.shape[0], CHECK_MM):
        for column in range(0, picture.shape[1], CHECK_MM):
            field = np.s_[row : row + CHECK_MM, column : column + CHECK_MM]
            source = moved if (row + column) // CHECK_MM % 2 else atlas
            np.testing.assert_array_equal(picture[field], source[field])


def test_page_stands_alone(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object"}
        assert "href" not in attributes
        if "src" in attributes:
            assert tag == "img" and (attributes["src"] or "").startswith("data:image/png;base64,")
            assert attributes["alt"]
    assert "http://" not in page.source and "https://" not in page.source
    assert "url(" not in page.source and "@import" not in page.source
    assert page.source.startswith("<!DOCTYPE html>") and page.tags[0] == ("html", {"lang": "en"})
    assert page.rows() == ROWS
    assert "prefers-color-scheme:dark" in page.source and "@media print" in page.source
    assert len(page.source) < 3_000_000


def test_only_the_pages_own_script_may_run(page: Page) -> None:
    policy = next(a["content"] or "" for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    script = page.source[page.source.index("<script>") + 8 : page.source.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}' 'strict-dynamic'" in policy
    assert "default-src 'none'" in policy and "connect-src" not in policy


def test_everything_in_the_report_is_shown(page: Page) -> None:
    of_the_run = ("case-1", "sri24", "ab" * 32, "onnxruntime", "fp32", "t1, flair", "2.00 s", "2.50 s", "brats2018")
    measured = ("30.00", "22.54", "22.50", "75.0 %", "99.8 %", "0.010 %", "1.300", "0.700", "0.910", "1.1000", "0.1.0")
    measured += ("0.123", "0.987", "1.765", "0.234", "0.345", "0.456")
    for words in (*of_the_run, *measured, "slices are thick", "case-1_xfm.nii.gz", "Not a medical device"):
        assert words in page.words, words
    assert "not computed" in page.words  # the Jacobian outside the tumour
    assert page.words.index("shrink") < page.words.index("slices are thick") < page.words.index("Axial")


@pytest.mark.parametrize(
    ("answer", "color"), [("kept", "good"), ("shrunk", "bad"), ("grown", "bad"), ("no_tumor", "open"), (None, "open")]
)
def test_the_verdict_is_the_reports(answer: str | None, color: str) -> None:
    given = inputs()
    given.report["volume_verdict"] = {"answer": answer, "kept_percent": None, "text": "What it says."}
    shown = given.page()
    assert "What it says." in shown.words
    assert ("p", {"class": f"verdict {color}"}) in shown.tags


def test_everything_is_escaped() -> None:
    evil = '<script>alert("1")</script>&'

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(item) for key, item in value.items()}
        return [evil] if isinstance(value, list) else evil

    given = inputs()
    given.report = poisoned(given.report)
    for mapping in ("timings_s", "versions", "outputs"):
        given.report[mapping][evil] = 1.0
    given.modality = evil
    shown = given.page()
    assert shown.source.lower().count("<script") == 1  # the page's own
    assert shown.words.count(evil) >= 25


@pytest.mark.parametrize("keys", ["none", "missing"])
def test_without_segmentation_field_and_report(keys: str) -> None:
    given = inputs()
    given.report = dict.fromkeys(given.report) if keys == "none" else {}
    given.native_labels = given.moved_labels = given.field = given.jacobian = None
    shown = given.page()
    assert shown.words.count("not computed") > 15
    assert shown.rows() == {"case", "atlas", "moved", "blend", "checker"}
    for plane in PLANES:
        assert not any(outline(shown.pixels(row, plane)).any() for row in ("case", "atlas", "moved"))


def test_planes_find_a_tumor_that_was_lost_on_the_way() -> None:
    given = inputs()
    assert given.moved_labels is not None
    given.moved_labels[:] = 0
    shown = given.page()
    for plane in PLANES:
        picture = shown.pixels("case", plane)
        want = expected(TUMOR, CENTER, picture.shape, plane)
        np.testing.assert_allclose(span(outline(picture))[0], want, atol=2.5)
        assert not outline(shown.pixels("atlas", plane)).any()
        through = 3 - sum(PLANES[plane])
        assert abs(shown.origin("atlas", plane)[through] - to_fixed(TUMOR)[through]) < 1.0


def test_planes_of_the_case_follow_the_displacement() -> None:
    shown = inputs(u=(6.0, -4.0, 5.0)).page()
    for plane in PLANES:
        middle, length = span(outline(shown.pixels("case", plane)))
        want = expected(TUMOR, CENTER, shown.pixels("case", plane).shape, plane)
        np.testing.assert_allclose(middle, want, atol=2.5)
        np.testing.assert_allclose(length, 2.0 * TUMOR_MM, atol=3.0)


def test_an_image_of_one_value_is_bright() -> None:
    given = inputs()
    given.fixed = Volume(np.where(given.fixed.data > 0, np.float32(50), 0), given.fixed.geometry)
    picture = given.page().pixels("atlas", "axial")
    assert picture[picture.shape[0] // 2, picture.shape[1] // 2].min() == 255 and not picture[0, 0].any()


def test_empty_images_are_drawn() -> None:
    given = inputs()
    given.native = Volume(np.zeros((5, 4, 3), dtype=np.int16), Geometry((5, 4, 3), np.eye(4)))
    given.native_labels = None
    given.moved = np.zeros_like(given.moved)
    given.fixed = Volume(np.zeros_like(given.fixed.data), given.fixed.geometry)
    assert given.page().rows() == ROWS


# What is shown --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ["LAS", "PIR", "SAL"])
def test_extent_and_centre_of_the_foreground(orientation: str) -> None:
    grid = oblique(orientation)
    at = points(grid)
    sparse = Sparse.of(Volume(case_image(at), grid))
    seen = at[:: sparse.steps[0], :: sparse.steps[1], :: sparse.steps[2]][sparse.mask]
    assert 1000 < len(seen) == sparse.values.size < at.size / 3
    np.testing.assert_allclose(sparse.extent(), [seen.min(axis=0), seen.max(axis=0)], atol=1e-9)
    np.testing.assert_allclose(sparse.center(), seen.mean(axis=0), atol=1e-9)


def test_without_a_foreground_the_whole_grid_is_shown() -> None:
    grid = Geometry.aligned((5, 6, 7), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), "RAS")
    sparse = Sparse.of(Volume(np.zeros(grid.shape, dtype=np.float32), grid))
    np.testing.assert_allclose(sparse.extent(), [[-2.0, -2.5, -3.0], [2.0, 2.5, 3.0]])


@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.99])
@pytest.mark.parametrize("shape", [(60, 45), (9, 40)])
def test_small_holes_are_closed(share: float, shape: tuple[int, int]) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    grey = (np.random.default_rng(3).random(shape) < share).astype(np.float32)
    widened = ndimage.maximum_filter(grey, 11, mode="nearest")
    np.testing.assert_array_equal(_closed(grey), ndimage.minimum_filter(widened, 11, mode="nearest") > 0)
