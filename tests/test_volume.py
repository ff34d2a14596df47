"""Images as the pipeline takes them: of whatever intensities, the brain above zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from jrs.geometry import Geometry
from jrs.volume import Volume, foreground_mask, raised

SHAPE = (40, 48, 36)


def brain(seed: int = 0) -> tuple[Any, Any]:
    """Intensities from 200 to 1000 in an ellipsoid, exactly 0 around it; and where it is."""
    axes = [np.linspace(-1.2, 1.2, n) for n in SHAPE]
    inside = sum(a**2 for a in np.meshgrid(*axes, indexing="ij")) < 1.0
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 1.5)
    texture = (texture - texture.min()) / np.ptp(texture)
    return np.where(inside, 200.0 + 800.0 * texture, 0.0).astype(np.float32), inside


def zscored(data: Any, inside: Any) -> Any:
    """As nnU-Net and MONAI (``nonzero``) write it."""
    return np.where(inside, (data - data[inside].mean()) / data[inside].std(), 0.0).astype(np.float32)


def test_a_brain_normalised_around_zero_is_raised_above_it() -> None:
    data, inside = brain()
    scored = zscored(data, inside)
    assert (scored[inside] < 0).mean() > 0.3
    lifted = raised(scored)
    np.testing.assert_array_equal(lifted == 0, ~inside)
    np.testing.assert_allclose(lifted[inside] - scored[inside], lifted[inside][0] - scored[inside][0], atol=1e-5)
    np.testing.assert_array_equal(foreground_mask(lifted), inside)
    volume = Volume(scored, Geometry(SHAPE, np.diag([2.0, 2.0, 2.0, 1.0])))
    np.testing.assert_array_equal(volume.foreground(), inside)
    assert volume.canonical.data.min() == 0.0
    assert volume.foreground_ml == pytest.approx(inside.sum() * 0.008, rel=0.01)
    np.testing.assert_array_equal(volume.data, scored)  # what is moved and written


@pytest.mark.parametrize("kind", ["scaled whole numbers", "air of -1", "air of 40"])
def test_air_of_another_number_becomes_zero(kind: str) -> None:
    data, inside = brain()
    if kind == "scaled whole numbers":  # z-scores in int16 with a slope and an intercept, as nibabel stores them
        scored = zscored(data, inside)
        slope = np.ptp(scored) / 65000.0
        given = (np.rint(scored / slope) * slope).astype(np.float32) - np.float32(1.7e-5)
    elif kind == "air of -1":
        given = np.where(inside, data / 500.0 - 1.0, -1.0).astype(np.float32)
    else:
        given = np.where(inside, data + 40.0, 40.0).astype(np.float32)
    assert not (given == 0).any()
    lifted = raised(given)
    np.testing.assert_array_equal(lifted == 0, ~inside)
    np.testing.assert_array_equal(foreground_mask(lifted), inside)
    assert np.corrcoef(lifted[inside], data[inside])[0, 1] > 0.9999


@pytest.mark.parametrize("kind", ["air of -1000", "air of -32768", "z-scores in air of -9", "brain 5000 above 0"])
def test_a_brain_far_above_the_air_keeps_its_contrast(kind: str) -> None:
    data, inside = brain()
    if kind == "brain 5000 above 0":
        given = np.where(inside, data + 5000.0, 0.0).astype(np.float32)
    else:
        scored = zscored(data, inside) if kind.startswith("z") else data
        given = np.where(inside, scored, float(kind.split()[-1])).astype(np.float32)
    lifted = raised(given)
    np.testing.assert_array_equal(lifted == 0, ~inside)
    np.testing.assert_array_equal(foreground_mask(lifted), inside)
    assert np.corrcoef(lifted[inside], data[inside])[0, 1] > 0.999
    # As far above zero as its own range has to do with, and no further.
    dark, bright = np.percentile(lifted[inside], (2, 98))
    assert 0.1 < dark / (bright - dark) < 0.4


def test_the_edge_of_a_brain_resampled_with_its_air_far_below_is_no_part_of_its_range() -> None:
    data, inside = (ndimage.zoom(image, 3, order=0) for image in brain())
    filled = np.where(inside, data, -5000.0)
    given, wanted, share = (
        ndimage.shift(image, (0.5, 0.5, 0.5), order=1, mode="nearest")
        for image in (filled, data.astype(float), inside.astype(float))
    )
    lifted = raised(given.astype(np.float32))
    whole = share > 0.999
    assert np.corrcoef(lifted[whole], wanted[whole])[0, 1] > 0.999
    # Above zero by no more of its range than it was before the air was changed.
    dark, bright = np.percentile(lifted[whole], (2, 98))
    before, after = np.percentile(wanted[whole], (2, 98))
    assert 0.1 < dark / (bright - dark) < before / (after - before)
    assert lifted[(share > 0.001) & ~whole].max() < bright and (lifted[share == 0] == 0).all()


def test_a_splines_ripples_are_air() -> None:
    """Of an image normalised around zero and then resampled: none of its zeros is one any more."""
    data, inside = brain()
    fine = ndimage.zoom(zscored(data, inside).astype(np.float64), 1.37, order=3).astype(np.float32)
    fine += np.float32(1e-7)
    where = ndimage.zoom(inside.astype(float), 1.37, order=1) > 0.5
    found = foreground_mask(raised(fine))
    assert 2 * (found & where).sum() / (found.sum() + where.sum()) > 0.93


@pytest.mark.parametrize("kind", ["plain", "one intensity", "ripples", "few below", "all below", "no air", "nothing"])
def test_other_images_stay_as_they_are(kind: str) -> None:
    data, inside = brain()
    if kind == "ripples":  # of resampling, everywhere in the air
        data[~inside] = np.random.default_rng(1).normal(0.0, 8.0, np.count_nonzero(~inside))
        data[:4] = 0.0
    elif kind == "few below":
        data[inside] -= np.percentile(data[inside], 5.0)
    elif kind == "all below":
        data = -data
    elif kind == "no air":  # a raw image's noise, in whole numbers
        data = np.rint(np.where(inside, data, 0.0) + np.random.default_rng(2).rayleigh(6.0, SHAPE)).astype(np.float32)
    elif kind == "one intensity":
        data[inside] = 300.0
    elif kind == "nothing":
        data[:] = 0.0
    assert raised(data) is data


def test_the_network_sees_no_difference() -> None:
    from jrs.architecture import Architecture
    from jrs.manifest import GridSpec, ModelSpec
    from jrs.runtime.preprocess import network_input

    data, inside = brain()
    geometry = Geometry.aligned(SHAPE, (4.0, 4.0, 4.0), np.zeros(3), "LPS")
    grid = Geometry.aligned((32, 48, 32), (4.0, 4.0, 4.0), np.zeros(3), "RAS")
    where = GridSpec(grid.shape, grid.spacing)
    spec = ModelSpec(Architecture(in_channels=1), grid=where, channels=("t1",), optional_channels=())
    images = [Volume(image, geometry) for image in (data, zscored(data, inside))]
    given = [network_input({"t1": image}, spec, grid).tensor for image in images]
    np.testing.assert_allclose(given[1], given[0], atol=1e-4)
