"""``jrs evaluate`` on a cohort of phantoms: numbers against SimpleITK and hand counts, files, failures, resuming."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import jrs

ROOT = Path(jrs.__file__).resolve().parent.parent
NO_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "monai", "onnx"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
"""
SHAPE = (34, 38, 32)
PLAIN = ("--backend", "ort-cpu", "--refine", 0)


def evaluate(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``jrs evaluate`` in a process of its own."""
    code = f"{before}from jrs.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "evaluate", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))},
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Path:
    """Three phantoms shifted against each other: T1 and FLAIR, structures, a tumour, landmarks; and a manifest."""
    root = tmp_path_factory.mktemp("cohort")
    lines = ["case,t1,flair,seg,structures,landmarks"]
    for number, shift in enumerate([(0.0, 0.0, 0.0), (4.0, -3.0, 2.0), (-5.0, 2.0, 0.0)]):
        name = f"p{number}"
        affine = helpers.grid_affine(SHAPE, (4.0, 3.9, 4.1), "LPS", (0.0, 0.0, 2.0 * number), shift)
        points = helpers.world_points(affine, SHAPE) - np.array(shift).reshape(3, 1, 1, 1)
        for contrast, modality in ((0, "t1"), (3, "flair")):
            data = helpers.head(points, contrast).astype(np.float32)
            helpers.write_image(root / name / f"{name}_{modality}.nii.gz", data, affine)
        inside = helpers.head(points) > 40
        labels = np.where(inside & (points[0] < 0), 2, 0) + np.where(inside & (points[0] >= 0), 41, 0)
        labels[ball(points, (-15, 8, 6), 12)] = 4
        helpers.write_image(root / name / f"{name}_aseg.nii.gz", labels.astype(np.int16), affine)
        tumor = np.zeros(SHAPE, dtype=np.uint8)
        for value, radius in ((2, 14), (1, 10), (4, 6)):
            tumor[ball(points, (18, 12, 9), radius)] = value
        helpers.write_image(root / name / f"{name}_seg.nii.gz", tumor, affine)
        marks = np.array([(0, 0, 0), (20, 10, 10), (-20, 15, 5)]) + shift
        text = "".join(f"{i},{-x},{-y},{z}\n" for i, (x, y, z) in enumerate(marks))
        (root / name / f"{name}_landmarks.csv").write_text(f"Landmark,X,Y,Z\n{text}", encoding="utf-8")
        files = [f"{name}/{name}_{what}" for what in ("t1.nii.gz", "flair.nii.gz", "seg.nii.gz", "aseg.nii.gz")]
        lines.append(",".join([name, *files, f"{name}/{name}_landmarks.csv"]))
    (root / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def ball(points: Any, center: tuple[float, float, float], radius: float) -> Any:
    return np.linalg.norm(points - np.array(center).reshape(3, 1, 1, 1), axis=0) < radius


def table(out: Path) -> dict[tuple[str, str, str, str], float]:
    """(moving, method, metric, of) to value."""
    with (out / "cases.csv").open(encoding="utf-8", newline="") as stream:
        return {
            (r["moving"], r["method"], r["metric"], r["of"]): float(r["value"] or "nan") for r in csv.DictReader(stream)
        }


@pytest.fixture(scope="module")
def ring(cohort: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The cohort in a ring, without PyTorch: what the command printed, and its folder."""
    out = tmp_path_factory.mktemp("evaluated") / "ring"
    options = ("--pairing", "ring", "--baseline", "identity", *PLAIN, "--out", out)
    done = evaluate(tiny_bundle, cohort / "manifest.csv", *options, before=NO_TORCH)
    assert done.returncode == 0, done.stderr
    return done, out


# Numbers --------------------------------------------------------------------------------------------------


def test_landmarks_without_registration_are_the_shifts(ring: tuple[Any, Path]) -> None:
    found = table(ring[1])
    assert found["p0", "identity", "landmark_median_mm", ""] == pytest.approx(math.sqrt(16 + 9 + 4), rel=1e-5)
    assert found["p0", "identity", "landmark_robustness", ""] == 0.0
    # A shift is the affine's to find.
    assert found["p0", "affine", "landmark_median_mm", ""] < 1.5
    assert found["p0", "affine", "landmark_robustness", ""] == 1.0


def test_structures_without_registration_are_simpleitks(ring: tuple[Any, Path], cohort: Path, helpers: Any) -> None:
    import SimpleITK as sitk

    moving, fixed = (
        helpers.sitk_image(np.asarray(image.dataobj).astype(np.int32), image.affine)
        for image in (nib.load(cohort / p / f"{p}_aseg.nii.gz") for p in ("p0", "p1"))
    )
    moved = sitk.Resample(moving, fixed, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    measure = sitk.LabelOverlapMeasuresImageFilter()
    measure.Execute(fixed, moved)
    found = table(ring[1])
    names = {"left_cerebral_white_matter": 2, "left_lateral_ventricle": 4, "right_cerebral_white_matter": 41}
    for name, number in names.items():
        expected = measure.GetDiceCoefficient(number)
        assert found["p0", "identity", "structure_dice", name] == pytest.approx(expected, abs=2e-3)
    mean = np.mean([found["p0", "identity", "structure_dice", name] for name in names])
    assert found["p0", "identity", "structure_dice", "mean"] == pytest.approx(mean, rel=1e-5)
    assert found["p0", "affine", "structure_dice", "mean"] > mean + 0.05


def test_the_tumour_is_counted_and_compared(ring: tuple[Any, Path], cohort: Path) -> None:
    found = table(ring[1])
    image = nib.load(cohort / "p1" / "p1_seg.nii.gz")
    truth = np.asarray(image.dataobj)
    voxel = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    for region, values in {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}.items():
        assert found["p1", "jrs", "tumor_true_ml", region] == pytest.approx(np.isin(truth, values).sum() * voxel)
        assert found["p1", "jrs", "tumor_ml", region] == found["p1", "jrs", "tumor_true_ml", region]
        assert 0.0 <= found["p1", "jrs", "tumor_dice", region] <= 1.0
    assert found["p1", "affine", "tumor_volume_to_affine", "WT"] == 1.0
    ratio = found["p1", "jrs", "tumor_volume_ratio", "WT"] / found["p1", "affine", "tumor_volume_ratio", "WT"]
    assert found["p1", "jrs", "tumor_volume_to_affine", "WT"] == pytest.approx(ratio, rel=1e-4)


def test_similarity_and_folding_tell_the_methods_apart(ring: tuple[Any, Path]) -> None:
    found = table(ring[1])
    for case in ("p0", "p1", "p2"):
        similarity = {m: found[case, m, "correlation_outside_tumor", ""] for m in ("affine", "identity")}
        assert similarity["identity"] < similarity["affine"] <= 1.0
        assert found[case, "affine", "folding_percent", ""] == 0.0
        assert found[case, "affine", "jacobian_sd_log", ""] == pytest.approx(0.0, abs=1e-4)
        assert found[case, "jrs", "jacobian_sd_log", ""] > 0.001
        assert found[case, "jrs", "seconds", ""] > found[case, "affine", "seconds", ""] > 0.0


# Files and streams ----------------------------------------------------------------------------------------


def test_one_line_on_stdout_and_the_rest_on_stderr(ring: tuple[Any, Path]) -> None:
    done, out = ring
    assert done.stdout.count("\n") == 1
    line = json.loads(done.stdout)
    assert (line["out"], line["pairs"], line["failed"]) == (str(out), 3, {})
    values = [v for (_, m, metric, of), v in table(out).items() if (m, metric, of) == ("jrs", "structure_dice", "mean")]
    assert line["mean"]["structure_dice mean"]["jrs"] == pytest.approx(np.mean(values), rel=1e-4)
    assert "pair 3 of 3: p2 to p0" in done.stderr
    assert "| structure_dice mean " in done.stderr


def test_every_file_is_there_and_readable(ring: tuple[Any, Path]) -> None:
    out = ring[1]
    tables = {"cases.csv", "summary.csv", "comparisons.csv", "summary.json", "summary.md"}
    plots = {"methods.png", "structures.png", "tumor.png"}
    assert {path.name for path in out.iterdir()} == {*tables, *plots, "pairs"}
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["methods"] == ["jrs", "affine", "identity"]
    tests = [c for c in summary["comparisons"] if (c["metric"], c["other"]) == ("structure_dice", "identity")]
    assert [c["n"] for c in tests] == [3]
    for name in plots:
        with Image.open(out / name) as image:
            assert image.width > 600
            assert np.asarray(image.convert("L")).std() > 5


# Choosing pairs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--atlas", "p1"), [("p0", "p1"), ("p2", "p1")]),
        (("--pairing", "ring"), [("p0", "p1"), ("p1", "p2"), ("p2", "p0")]),
        (("--pairing", "all"), [(a, b) for b in ("p0", "p1", "p2") for a in ("p0", "p1", "p2") if a != b]),
        ((), [("p0", "sri24"), ("p1", "sri24"), ("p2", "sri24")]),
        (("--limit", 1), [("p0", "sri24")]),
    ],
)
def test_which_pairs_are_chosen(cohort: Path, options: tuple[Any, ...], expected: list[tuple[str, str]]) -> None:
    from jrs.evaluate.run import EvaluateRequest, choose_pairs

    named = {str(options[i]).removeprefix("--"): options[i + 1] for i in range(0, len(options), 2)}
    pairs = choose_pairs(EvaluateRequest("default", cohort / "manifest.csv", cohort / "none", **named))
    assert [(pair.moving.name, pair.fixed.name) for pair in pairs] == expected


def test_pairs_from_a_file(cohort: Path, tmp_path: Path) -> None:
    from jrs.errors import BadDataError
    from jrs.evaluate.run import EvaluateRequest, choose_pairs

    file = tmp_path / "pairs.csv"
    file.write_text("moving, fixed\np2, p0\np1, sri24\n", encoding="utf-8")
    request = EvaluateRequest("default", cohort / "manifest.csv", tmp_path / "none", pairs=file)
    assert [pair.name for pair in choose_pairs(request)] == ["p2 to p0", "p1 to sri24"]
    file.write_text("moving,fixed\np9,p0\n", encoding="utf-8")
    with pytest.raises(BadDataError, match="'p9'"):
        choose_pairs(request)


# What goes wrong ------------------------------------------------------------------------------------------


def test_a_failed_pair_is_named_and_resume_does_only_what_is_left(
    cohort: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(cohort, data)
    image = data / "p1" / "p1_t1.nii.gz"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    options = ("--atlas", "p0", "--affine", "off", *PLAIN, "--out", tmp_path / "out")
    done = evaluate(tiny_bundle, data / "manifest.csv", *options)
    assert done.returncode == 1, done.stderr
    failed = json.loads(done.stdout)["failed"]
    assert list(failed) == ["p1 to p0"] and failed["p1 to p0"].startswith(f"{image}: is cut off")
    assert {key[0] for key in table(tmp_path / "out")} == {"p2"}
    (kept,) = (tmp_path / "out" / "pairs").iterdir()
    before = kept.stat().st_mtime_ns

    refused = evaluate(tiny_bundle, data / "manifest.csv", *options)
    assert refused.returncode == 73 and "--resume" in refused.stderr
    image.write_bytes(whole)
    done = evaluate(tiny_bundle, data / "manifest.csv", *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert kept.stat().st_mtime_ns == before
    assert "p2 to p0" not in done.stderr and "p1 to p0" in done.stderr
    assert {key[0] for key in table(tmp_path / "out")} == {"p1", "p2"}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--baseline", "elastix"), 2, "elastix"),
        (("--pairing", "star"), 2, "star"),
        (("--pairing", "ring", "--atlas", "sri24"), 2, "exclude"),
        (("--affine", "x.txt"), 2, "--affine"),
        (("--landmark-space", "mni"), 2, "--landmark-space"),
        (("--pairs", "nowhere.csv"), 66, "nowhere.csv"),
        (("--atlas", "nowhere"), 66, "nowhere"),
    ],
)
def test_requests_that_cannot_be_met(
    cohort: Path, tmp_path: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    done = evaluate("default", cohort / "manifest.csv", "--out", tmp_path / "out", *options)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and done.stdout == "" and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ants-masked", "greedy"])
def test_a_missing_program_is_named_with_its_remedy(cohort: Path, tmp_path: Path, name: str) -> None:
    before = "import sys; sys.modules['ants'] = sys.modules['picsl_greedy'] = None; "
    done = evaluate("default", cohort / "manifest.csv", "--out", tmp_path, "--baseline", name, before=before)
    assert done.returncode == 69
    assert name in done.stderr and "jrs[peers]" in done.stderr


def test_another_program_that_fails_takes_no_scores_with_it(cohort: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    # A module of that name that can be found and cannot be used, as one built for another numpy.
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "picsl_greedy.py").write_text("raise ImportError('built for another numpy')\n", encoding="utf-8")
    before = f"import sys; sys.path.insert(0, {str(broken)!r}); "
    options = ("--atlas", "p0", "--limit", 1, "--affine", "off", *PLAIN, "--baseline", "greedy")
    done = evaluate(tiny_bundle, cohort / "manifest.csv", *options, "--out", tmp_path / "out", before=before)
    assert done.returncode == 1, done.stderr
    assert "built for another numpy" in json.loads(done.stdout)["failed"]["p1 to p0"]
    assert {key[1] for key in table(tmp_path / "out")} == {"jrs", "affine"}


@pytest.mark.slow
def test_a_checkpoint_is_exported_first(cohort: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    checkpoint = tiny_bundle.parent / "tiny.safetensors"
    options = ("--atlas", "p0", "--affine", "off", "--limit", 1, *PLAIN)
    tables = []
    for number, model in enumerate((checkpoint, tiny_bundle)):
        done = evaluate(model, cohort / "manifest.csv", *options, "--out", tmp_path / str(number))
        assert done.returncode == 0, done.stderr
        tables.append(table(tmp_path / str(number)))
    for key, value in tables[0].items():
        if key[2] != "seconds":
            assert value == pytest.approx(tables[1][key], rel=1e-3, nan_ok=True), key
