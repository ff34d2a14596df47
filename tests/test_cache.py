"""The cache of prepared cases: what is in it, when it is used and when not, and every way in which it can break."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jrs.architecture import Architecture
from jrs.errors import BadDataError, CannotCreateError, ConfigurationError, MissingInputError
from jrs.files import sha256_of
from jrs.manifest import GridSpec, ModelSpec
from jrs.reading import read_volume
from jrs.runtime.preprocess import network_input, place_grid
from jrs.runtime.sampling import affine_coords, sample_nearest
from jrs.train.cache import CASES, INDEX, Cache
from jrs.train.cache_build import BuildReport, build_cache
from jrs.train.datasets import TrainingCase, find_cases
from jrs.train.pool import for_each

Array = np.ndarray[Any, Any]
ROOT = Path(__file__).parents[1]
SHAPE = (26, 30, 24)
SPACING = (6.0, 6.0, 6.0)


def spec(**changes: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "architecture": Architecture(in_channels=2, base_channels=2),
        "channels": ("t1", "flair"),
        "optional_channels": ("flair",),
        "grid": GridSpec((16, 16, 16), (9.0, 10.0, 8.0)),
    }
    return ModelSpec(**{**values, **changes})


@dataclasses.dataclass(frozen=True)
class Cohort:
    """BraTS-like cases on the grid of the atlas, in ``data``."""

    data: Path
    atlas: Path
    cache: Path
    affine: Array

    def path(self, k: int, kind: str) -> Path:
        return self.data / f"BraTS2021_{k:05d}" / f"BraTS2021_{k:05d}_{kind}.nii.gz"

    def cases(self) -> list[TrainingCase]:
        return find_cases(self.data)

    def build(self, model: ModelSpec | None = None, **options: Any) -> BuildReport:
        return build_cache(self.cases(), model or spec(), self.atlas, self.cache, **options)

    def folders(self) -> dict[str, Path]:
        index = Cache.open(self.cache).index
        return {entry.name: self.cache / CASES / entry.record.key for entry in index.entries}

    def stamps(self) -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in (self.cache / CASES).rglob("*.npy")}


@pytest.fixture
def cohort(tmp_path: Path, helpers: Any) -> Cohort:
    affine = helpers.grid_affine(SHAPE, SPACING, "LPS")
    made = Cohort(tmp_path / "data", tmp_path / "atlas.nii.gz", tmp_path / "cache", affine)
    points = helpers.world_points(affine, SHAPE)
    helpers.write_image(made.atlas, helpers.head(points).astype(np.float32), affine)
    for k in range(4):
        for contrast, kind in ((0, "t1"), (3, "flair")):
            helpers.write_image(made.path(k, kind), helpers.head(points * (1 + 0.02 * k), contrast), affine)
        seg = np.zeros(SHAPE, np.uint8)
        seg[12:18, 12:18, 9:15] = np.array((1, 2, 4)).repeat(2)
        helpers.write_image(made.path(k, "seg"), seg, affine)
    return made


# What is in it ----------------------------------------------------------------------------------------------


def test_a_cached_case_is_the_case_as_deployment_prepares_it(cohort: Cohort) -> None:
    report = cohort.build()
    assert not report.index.failed and report.reused == 0
    cache = Cache.open(cohort.cache)
    atlas = read_volume(cohort.atlas)
    grid = place_grid(spec().grid, atlas)[0]
    for k, case in enumerate(cohort.cases()):
        stored = cache.load(case.name)
        volumes = {m: read_volume(cohort.path(k, m)) for m in ("t1", "flair")}
        expected = network_input(volumes, spec(), grid).tensor[0].astype(np.float16)
        assert isinstance(stored.image, np.memmap) and stored.image.dtype == np.float16
        np.testing.assert_array_equal(stored.image, expected)
        assert stored.present == (True, True)
        labels = read_volume(cohort.path(k, "seg"), labels=True)
        values = sample_nearest(labels.data, affine_coords(grid.shape, labels.geometry.inverse @ grid.affine))
        assert stored.tumor is not None and stored.tumor.dtype == np.uint8
        np.testing.assert_array_equal(stored.tumor, np.where(values == 4, 3, values))
        assert {1, 2, 3} <= set(np.unique(stored.tumor).tolist()) and stored.structures is None
    assert [c.files() for c in find_cases(cohort.cache)] == [c.files() for c in cohort.cases()]


def test_structures_and_missing_labels(cohort: Cohort, helpers: Any) -> None:
    aseg = np.where(helpers.head(helpers.world_points(cohort.affine, SHAPE)) > 50, 2, 0).astype(np.int16)
    helpers.write_image(cohort.path(0, "aseg"), aseg, cohort.affine)
    cohort.path(0, "seg").unlink()
    cohort.path(0, "flair").unlink()
    cohort.build()
    stored = Cache.open(cohort.cache).load("BraTS2021_00000")
    assert stored.tumor is None and stored.present == (True, False) and not stored.image[1].any()
    grid = place_grid(spec().grid, read_volume(cohort.atlas))[0]
    white = helpers.head(helpers.world_points(grid.affine, grid.shape)) > 50
    assert stored.structures is not None and set(np.unique(stored.structures).tolist()) == {0, 1}
    assert ((stored.structures == 1) == white).mean() > 0.95


def test_a_case_off_the_atlas_grid_is_aligned_unless_told_otherwise(cohort: Cohort, helpers: Any) -> None:
    """The same head, moved by 25 mm and on another grid: aligned it looks as the unmoved one does."""
    shape, shift = (30, 32, 28), np.array([25.0, -15.0, 10.0])
    affine = helpers.grid_affine(shape, (6.0, 6.0, 6.0), "RAS", (5.0, 0.0, 4.0), tuple(shift))
    points = helpers.world_points(affine, shape) - shift[:, None, None, None]
    cohort.path(0, "flair").unlink()
    cohort.path(0, "seg").unlink()
    helpers.write_image(cohort.path(0, "t1"), helpers.head(points).astype(np.float32), affine)
    still = read_volume(cohort.atlas)
    grid = place_grid(spec().grid, still)[0]
    wanted = network_input({"t1": still}, spec(), grid).tensor[0, 0]

    def likeness(align: Any) -> tuple[float, Any]:
        cohort.build(align=align)
        cache = Cache.open(cohort.cache)
        image = cache.load("BraTS2021_00000").image[0].astype(np.float32)
        return float(np.corrcoef(image.ravel(), wanted.ravel())[0, 1]), cache

    off, _ = likeness("off")
    aligned, cache = likeness("auto")
    assert aligned > 0.88 > 0.5 > off, (aligned, off)
    matrix = cache.entries["BraTS2021_00000"].record.moving_from_fixed
    assert np.array(matrix)[:3, 3] == pytest.approx(shift, abs=3.0)
    assert cache.entries["BraTS2021_00001"].record.moving_from_fixed is None


def test_several_processes_make_the_same_cache(cohort: Cohort) -> None:
    cohort.build()
    index = (cohort.cache / INDEX).read_bytes()
    other = dataclasses.replace(cohort, cache=cohort.cache.with_name("other"))
    other.build(workers=2)
    assert (other.cache / INDEX).read_bytes() == index
    assert not list((other.cache / CASES).glob(".*"))


# Used again, or not -----------------------------------------------------------------------------------------


def test_what_is_there_is_not_done_again(cohort: Cohort) -> None:
    cohort.build()
    before = cohort.stamps()
    assert cohort.build().reused == 4
    assert cohort.stamps() == before


def test_a_touched_file_is_the_same_and_a_changed_one_is_not(cohort: Cohort, helpers: Any) -> None:
    cohort.build()
    os.utime(cohort.path(1, "t1"), (1, 1))
    assert cohort.build().reused == 4
    old = cohort.folders()
    data = np.asarray(nib.load(cohort.path(1, "t1")).dataobj) * 2 + 1
    helpers.write_image(cohort.path(1, "t1"), data, cohort.affine)
    report = cohort.build()
    assert (report.reused, report.removed) == (3, 1)
    assert not old["BraTS2021_00001"].exists() and old["BraTS2021_00002"].exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": GridSpec((16, 16, 16), (9.0, 9.0, 9.0))},
        {"normalization": "zscore-volume"},
        {"architecture": Architecture(in_channels=1, base_channels=2), "channels": ("t1",), "optional_channels": ()},
        {"label_values": (0, 1, 2, 3)},
    ],
)
def test_another_network_takes_nothing_from_it(cohort: Cohort, changes: Any) -> None:
    cohort.build()
    report = cohort.build(spec(**changes))
    assert (report.reused, report.removed) == (0, 4)


def test_another_atlas_takes_nothing_from_it(cohort: Cohort, helpers: Any) -> None:
    cohort.build()
    data = np.asarray(nib.load(cohort.atlas).dataobj) * np.float32(0.5)
    helpers.write_image(cohort.atlas, data, cohort.affine)
    assert cohort.build().reused == 0


def test_training_for_something_else_is_refused(cohort: Cohort) -> None:
    cohort.build()
    cache = Cache.open(cohort.cache)
    atlas = sha256_of(cohort.atlas)
    cache.check_fits(spec(), atlas)
    for changes, word in (
        ({"grid": GridSpec((32, 16, 16), (9.0, 10.0, 8.0))}, "grid"),
        ({"normalization": "zscore-volume"}, "normalization"),
        ({"channels": ("t1", "t2"), "optional_channels": ("t2",)}, "channels"),
    ):
        with pytest.raises(ConfigurationError, match=rf"^{cohort.cache}: was prepared for another {word} [^\n]+$"):
            cache.check_fits(spec(**changes), atlas)
    with pytest.raises(ConfigurationError, match="another atlas"):
        cache.check_fits(spec(), "0" * 64)


def test_a_network_of_fewer_channels_may_use_it(cohort: Cohort) -> None:
    cohort.build()
    cache = Cache.open(cohort.cache)
    architecture = Architecture(in_channels=1, base_channels=2, num_labels=0)
    one = spec(architecture=architecture, channels=("flair",), labels=(), label_values=())
    cache.check_fits(one, sha256_of(cohort.atlas))
    both, flair = cache.load("BraTS2021_00001"), cache.load("BraTS2021_00001", ("flair",))
    np.testing.assert_array_equal(flair.image, both.image[1:])
    assert flair.present == (True,)


def test_a_channel_that_became_needed(cohort: Cohort) -> None:
    cohort.path(2, "flair").unlink()
    cohort.build()
    needs = spec(optional_channels=())
    with pytest.raises(ConfigurationError, match="BraTS2021_00002 lacks flair"):
        Cache.open(cohort.cache).check_fits(needs, sha256_of(cohort.atlas))
    report = cohort.build(needs)
    assert report.reused == 3 and list(report.index.failed) == ["BraTS2021_00002"]


# Broken -----------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def replace_by_another(path: Path) -> None:
    size = path.stat().st_size
    np.save(path, np.zeros((size - 128) // 4, dtype=np.float32))
    assert path.stat().st_size == size


@pytest.mark.parametrize("harm", [cut, Path.unlink, replace_by_another])
def test_harm_that_opening_finds_and_preparing_mends(cohort: Cohort, harm: Callable[[Path], None]) -> None:
    cohort.build()
    folders = cohort.folders()
    image = folders["BraTS2021_00002"] / "image.npy"
    original = image.read_bytes()
    harm(image)
    with pytest.raises(BadDataError, match=rf"^{image}: [^\n]+run jrs data prepare again$"):
        Cache.open(cohort.cache)
    assert cohort.build().reused == 3
    assert image.read_bytes() == original
    Cache.open(cohort.cache).verify()


def test_a_flipped_bit_is_found_by_checksum(cohort: Cohort) -> None:
    cohort.build()
    tumor = cohort.folders()["BraTS2021_00003"] / "tumor.npy"
    original = tumor.read_bytes()
    flip(tumor)
    with pytest.raises(BadDataError, match=rf"^{tumor}: its checksum"):
        Cache.open(cohort.cache).verify()
    assert cohort.build().reused == 4  # sizes and headers are right
    assert cohort.build(verify=True).reused == 3
    assert tumor.read_bytes() == original


def test_a_record_that_is_damaged_is_done_again(cohort: Cohort) -> None:
    cohort.build()
    (cohort.folders()["BraTS2021_00001"] / "case.json").write_text('{"key": 1}')
    assert cohort.build().reused == 3


@pytest.mark.parametrize(
    ("content", "words"), [("{", "is not JSON"), ('{"format": 99}', "format 99"), ('{"format": 1, "x": 2}', "'x'")]
)
def test_an_index_that_is_none(cohort: Cohort, content: str, words: str) -> None:
    cohort.build()
    (cohort.cache / INDEX).write_text(content)
    with pytest.raises(ConfigurationError, match=words):
        Cache.open(cohort.cache)


def test_a_cache_that_was_not_finished(cohort: Cohort) -> None:
    cohort.build()
    (cohort.cache / INDEX).unlink()
    with pytest.raises(MissingInputError, match="not finished, run jrs data prepare again"):
        Cache.open(cohort.cache)
    with pytest.raises(MissingInputError, match="holds no index"):
        Cache.open(cohort.data)


def test_bad_cases_are_named_and_the_others_go_on(cohort: Cohort) -> None:
    cut(cohort.path(0, "t1"))
    cohort.path(1, "t1").unlink()
    seg = nib.load(cohort.path(2, "seg"))
    nib.save(nib.Nifti1Image(np.asarray(seg.dataobj) + np.uint8(7), seg.affine), cohort.path(2, "seg"))
    seen = []
    report = cohort.build(done=lambda outcome: seen.append(outcome.name), workers=2)
    assert [entry.name for entry in report.index.entries] == ["BraTS2021_00003"]
    failed = report.index.failed
    assert str(cohort.path(0, "t1")) in failed["BraTS2021_00000"] and "cut off" in failed["BraTS2021_00000"]
    assert "lacks t1" in failed["BraTS2021_00001"]
    assert "label 7 is unknown" in failed["BraTS2021_00002"]
    assert sorted(seen) == sorted(case.name for case in cohort.cases())
    assert Cache.open(cohort.cache).index.failed == failed


def test_two_at_once_are_refused(cohort: Cohort) -> None:
    def meddle(outcome: Any) -> None:
        with pytest.raises(CannotCreateError, match="another jrs data prepare"):
            cohort.build()

    cohort.build(done=meddle)


def test_a_place_that_cannot_be_written(cohort: Cohort) -> None:
    cohort.cache.write_text("a file")
    with pytest.raises(CannotCreateError, match=rf"^{cohort.cache}: [^\n]+$"):
        cohort.build()


# Killed -----------------------------------------------------------------------------------------------------

BUILD = """
import os, signal, sys
from pathlib import Path
import jrs.train.cache as cache
from jrs.architecture import Architecture
from jrs.manifest import GridSpec, ModelSpec
from jrs.train.cache_build import build_cache
from jrs.train.datasets import find_cases

data, atlas, out, at = sys.argv[1:]
spec = ModelSpec(
    Architecture(in_channels=2, base_channels=2), ("t1", "flair"), ("flair",), GridSpec((16, 16, 16), (9.0, 10.0, 8.0))
)
seen = []

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def done(outcome):
    seen.append(outcome)
    if at == f"after {len(seen)}":
        die()

if at == "before a record":
    cache.write_json = die
if at == "within an array":
    write = cache.np.lib.format.write_array_header_1_0
    cache.np.lib.format.write_array_header_1_0 = lambda stream, header: (write(stream, header), stream.flush(), die())
build_cache(find_cases(Path(data)), spec, Path(atlas), Path(out), done=done)
"""


def run_build(cohort: Cohort, at: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", before + BUILD, *map(str, (cohort.data, cohort.atlas, cohort.cache)), at],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("at", "finished"), [("within an array", 0), ("before a record", 0), ("after 1", 1), ("after 3", 3)]
)
def test_killed_and_begun_again(cohort: Cohort, at: str, finished: int) -> None:
    done = run_build(cohort, at)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (cohort.cache / INDEX).exists()
    with pytest.raises(MissingInputError, match="not finished"):
        Cache.open(cohort.cache)
    before = {p: n for p, n in cohort.stamps().items() if "/." not in p}
    report = cohort.build()
    assert report.reused == finished and len(report.index.entries) == 4
    assert {p: n for p, n in cohort.stamps().items() if p in before} == before  # what was finished was not touched
    assert not list((cohort.cache / CASES).glob(".*"))
    Cache.open(cohort.cache).verify()
    whole = dataclasses.replace(cohort, cache=cohort.cache.with_name("whole"))
    whole.build()
    assert (cohort.cache / INDEX).read_bytes() == (whole.cache / INDEX).read_bytes()


def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    slow = "import time, pathlib\ndef wait(path):\n    pathlib.Path(path).touch()\n    time.sleep(60)\n"
    (tmp_path / "slow.py").write_text(slow)
    code = f"from jrs.train.pool import for_each\nimport slow\nfor_each(slow.wait, [{str(tmp_path / 'a')!r}]*2, 2)"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "a").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("workers were left")


def test_a_worker_that_the_system_kills(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text("import os\ndef die(_):\n    os.kill(os.getpid(), 9)\n")
    code = textwrap.dedent("""
        import dying
        from jrs.errors import OutOfMemoryError
        from jrs.train.pool import for_each
        try:
            for_each(dying.die, [1, 2], 2)
        except OutOfMemoryError as error:
            print(error)
    """)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "--workers" in done.stdout


def test_items_and_results_keep_their_order() -> None:
    seen: list[int] = []
    assert for_each(abs, [-3, 2, -1], 2, seen.append) == [3, 2, 1]
    assert sorted(seen) == [1, 2, 3]
    assert for_each(abs, [], 2) == []


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits stand in for a full disk")
def test_a_disk_that_fills_up(cohort: Cohort) -> None:
    """A limit on the size of files, as a full disk: writing stops part way, nothing half is left, and it goes on."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (15000, 15000))\n"
    done = run_build(cohort, "never", limit)
    assert done.returncode == 1 and "CannotCreateError" in done.stderr and "File too large" in done.stderr
    assert not (cohort.cache / INDEX).exists() and not list((cohort.cache / CASES).iterdir())
    assert len(cohort.build().index.entries) == 4


def test_too_little_space_is_told_before_anything_is_done(cohort: Cohort) -> None:
    import shutil

    from jrs.errors import OutputError

    free = shutil.disk_usage(cohort.data).free
    side = 16 * (int((free / 4 / 4) ** (1 / 3)) // 16 + 6)
    with pytest.raises(OutputError, match=r"4 cases need about [\d.]+ GB and [\d.]+ GB are free"):
        cohort.build(spec(grid=GridSpec((side, side, side), (1.0, 1.0, 1.0))))
