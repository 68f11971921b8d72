"""Masks back on the voxels of their scans, their scores and pictures, on hand-made volumes."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import OBLIQUE, body_and_liver, save, save_patient
from scipy import ndimage

import data
from raw import volumes

INF = float("inf")


def export(notebook, root, predicted=None, names=("p1",)):
    """Slice raw/test, export its masks or other predictions; return the table of slices."""
    data.main(["--only", "test", "--size", "32"])
    _, masks, slices = data.load_test_data()
    predicted = masks if predicted is None else predicted
    (root / "preds").mkdir()
    for name in names:
        rows = slices[slices.scan == name]
        scan = rows.image.iloc[0]
        mask = notebook.make_mask(predicted[rows.index] * np.float16(0.9), scan, 0)
        data.write_mask(root / f"preds/{name}_liver.nii.gz", mask, scan)
    return slices


@pytest.mark.parametrize("affine", [None, OBLIQUE], ids=["axial", "oblique"])
@pytest.mark.parametrize("axes", ["LPS", "RAI", "SRA"])
def test_a_mask_that_is_predicted_as_it_was_comes_back_as_it_was(notebook, root, axes, affine):
    save_patient(root / "raw/test", axes=axes, affine=affine)
    slices = export(notebook, root)
    found, known = (nib.load(root / f"{f}/p1_liver.nii.gz") for f in ("preds", "raw/test"))
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(known.dataobj))
    found, known, spacing_mm = notebook.load_masks(slices, "preds")
    upright = body_and_liver()[1].transpose(2, 1, 0)
    np.testing.assert_array_equal(found, upright)
    np.testing.assert_array_equal(known, upright)
    assert spacing_mm == pytest.approx([2, 1, 1])


@pytest.mark.parametrize("axes", ["LPS", "SRA"])
def test_the_largest_piece_is_put_back_and_its_cavities_are_filled(notebook, root, axes):
    path = save(root / "a_orig.nii.gz", np.full((12, 9, 9), -1000, np.int16), axes=axes)
    expected = np.zeros((9, 9, 12), np.uint8)  # (slices, rows, columns)
    expected[1:6, 1:6, 1:6] = 1
    expected[3:, 4, 4] = 0  # a tunnel leads out through the last slices, like a vessel
    stack = np.zeros((9, 12, 12))
    stack[:, 1:10] = expected  # 9 rows in a picture of 12
    stack[2, 1 + 2, 2] = 0  # closed on all sides
    stack[7, 1 + 7, 8:11] = 1  # a small piece apart
    mask = notebook.make_mask(stack, path, 0)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(data.upright(mask, path), expected)


@pytest.mark.parametrize("axes", ["LPS", "SRA"])
def test_probabilities_are_smoothed_from_slice_to_slice_in_mm(notebook, root, axes):
    path = save(root / "a_orig.nii.gz", body_and_liver((32, 32, 7))[0], axes=axes)  # 2 mm a slice
    stack = np.zeros((7, 32, 32), np.float16)
    stack[:, 4:8, 4:8] = 1
    stack[3, 4:8, 4:8] = 0  # missed in one slice
    stack[3, 8:12, 4:8] = 1  # found in one slice
    stack[:2, 4:8, 8:12] = 1  # up to the end of the scan
    weights = np.exp(-0.5 * (np.arange(-5, 6) * 2 / 3) ** 2)  # of a Gaussian with a sigma of 3 mm
    centre, second = weights[5] / weights.sum(), weights[6] / weights.sum()
    assert centre < 0.5 < centre + 2 * second  # so one slice of seven never decides
    mask = notebook.make_mask(stack, path, 3)
    expected = np.zeros((7, 32, 32))
    expected[:, 4:8, 4:8] = 1
    expected[:2, 4:8, 8:12] = 1
    np.testing.assert_array_equal(data.upright(mask, path), expected)


def test_nothing_found_is_a_mask_too(notebook, root):
    path = save(root / "a_orig.nii.gz", body_and_liver()[0])
    mask = notebook.make_mask(np.zeros((6, 32, 32), np.float16), path, 5)
    assert mask.shape == (32, 32, 6) and not mask.any()


def one_voxel(*place):
    stack = np.zeros((4, 5, 6), bool)
    stack[place] = True
    return stack


def test_one_voxel_is_as_far_from_another_as_the_spacing_says(notebook):
    spacing_mm = np.array([3.0, 1.0, 0.5])
    for other, apart_mm in [
        ((1, 2, 3), 3),
        ((0, 4, 3), 2),
        ((0, 2, 5), 1),
        ((1, 2 + 2, 3), 13**0.5),
        ((0, 2, 3), 0),
    ]:
        scores = volumes.score_volume(one_voxel(*other), one_voxel(0, 2, 3), spacing_mm)
        assert scores["assd_mm"] == scores["hd95_mm"] == pytest.approx(apart_mm)


def test_what_only_one_mask_has_counts_from_its_side_whichever_is_the_reference(notebook):
    row = np.zeros((3, 5, 42), bool)
    row[1, 0, :40] = True  # a voxel thick, so that all 40 are surface
    with_one, with_three = row.copy(), row.copy()
    with_one[1, 4, 0] = with_three[1, 4, :3] = True  # 4 mm off
    for other, apart_mm, assd_mm in [
        (with_one, 0, 4 / (41 + 40)),  # 1 of 41 is less than 5 %
        (with_three, 4, 3 * 4 / (43 + 40)),  # 3 of 43 are more, of all 83 they would be less
    ]:
        for pair in [(other, row), (row, other)]:
            scores = volumes.score_volume(*pair, np.array([3.0, 1.0, 1.0]))
            assert scores["hd95_mm"] == apart_mm
            assert scores["assd_mm"] == pytest.approx(assd_mm)


def test_a_shifted_cube_has_the_distances_worked_out_by_hand(notebook):
    cube, shifted = np.zeros((2, 6, 6, 6), bool)
    cube[:3, 1:4, 1:4] = shifted[1:4, 1:4, 1:4] = True
    scores = volumes.score_volume(shifted, cube, np.array([3.0, 1.0, 2.0]))
    # 26 of 27 voxels are surface, all but the middle one. From either cube 9 of them lie one slice
    # of 3 mm off; 16 lie on the other surface; one faces the other's middle, 1 mm from the next row
    assert scores["assd_mm"] == pytest.approx((9 * 3 + 1) / 26)
    assert scores["hd95_mm"] == 3
    assert scores["dice"] == pytest.approx(18 / 27)


def test_the_surface_is_what_shares_a_face_or_an_edge_with_the_outside(notebook):
    spacing_mm, corner = np.array([3.0, 1.0, 2.0]), np.zeros((5, 5, 5), bool)
    corner[0, 0, 0] = True
    cube = np.zeros((5, 5, 5), bool)
    cube[:3, :3, :3] = True  # beyond the volume is outside, so all but 1 1 1 is surface
    places = np.delete(np.argwhere(cube), 13, axis=0)
    found, _ = volumes.surface_distances(cube, corner, spacing_mm)
    np.testing.assert_allclose(found, np.linalg.norm(places * spacing_mm, axis=1), rtol=1e-6)
    stack, surface = np.ones((2, 5, 5, 5), bool)
    stack[4, 4, 4] = stack[0, 4, 2] = False
    surface[1:4, 1:4, 1:4] = False  # the corner missing at 4 4 4 touches 3 3 3 by its tip alone
    surface[1, 3, 2] = True  # shares an edge with 0 4 2
    places = np.argwhere(surface & stack)
    found, _ = volumes.surface_distances(stack, corner, spacing_mm)
    np.testing.assert_allclose(found, np.linalg.norm(places * spacing_mm, axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("predicted", "reference", "known"),
    [
        (False, False, [1, 0, 0]),
        (False, True, [0, INF, INF]),
        (True, False, [0, INF, INF]),
        (True, True, [1, 0, 0]),
    ],
)
def test_empty_masks_have_known_scores(notebook, predicted, reference, known):
    one, other = one_voxel(1, 1, 1) & predicted, one_voxel(1, 1, 1) & reference
    assert list(volumes.score_volume(one, other, np.ones(3)).values()) == known


@pytest.fixture
def scored(notebook, root):
    """Return the scores of p1 (as its reference), p2 (one slice of two too few), p3 (no mask)."""
    names = ("p1", "p2", "p3")
    for name in names:
        save_patient(root / "raw/test", name, axes="RSA", mask=name != "p3")
    predicted = np.tile(body_and_liver()[1].transpose(2, 1, 0), (3, 1, 1))
    predicted[6 + 2] = 0  # p2's first of three slices, 10 x 10 voxels of 1 x 1 x 2 mm each
    return notebook.score_scans(export(notebook, root, predicted, names), "preds")


def test_patients_are_scored_on_their_own_grid(scored):
    p1, p2, _ = scored.to_dict("records")
    assert p1["dice"] == 1 and p1["hd95_mm"] == 0 and p1["liver_ml"] == 0.6
    assert p2["dice"] == pytest.approx(2 * 200 / (200 + 300))
    assert p2["hd95_mm"] == 2
    assert (p2["liver_ml"], p2["reference_ml"]) == (0.4, 0.6)


def test_a_scan_without_mask_is_left_out_of_the_scores(notebook, scored):
    p3 = scored.set_index("scan").loc["p3"]
    assert p3.slices == 6 and p3.liver_ml == 0.6
    assert p3.drop(["slices", "liver_ml"]).isna().all()
    table = notebook.add_mean_and_worst(scored).set_index("scan")
    assert table.loc["mean", "dice"] == pytest.approx((1 + 0.8) / 2)
    assert table.loc["mean", "liver_ml"] == pytest.approx(0.5)  # of the two that are scored


def test_the_worst_is_the_lowest_dice_and_the_largest_distance(notebook):
    scores = pd.DataFrame(
        {"scan": ["a", "b"], "slices": 9, "dice": [0.9, 0.8], "assd_mm": [1.0, 3]}
        | {"hd95_mm": [9.0, 8]}
    )
    table = notebook.add_mean_and_worst(scores).set_index("scan")
    assert table.loc["worst", "dice":"hd95_mm"].tolist() == [0.8, 3, 9]
    assert table.loc["mean", "assd_mm"] == pytest.approx(2)
    scores.loc[1, ["dice", "assd_mm", "hd95_mm"]] = 0, INF, INF  # missed: that does not vanish
    table = notebook.add_mean_and_worst(scores).set_index("scan")
    assert table.loc["mean", "assd_mm"] == table.loc["worst", "hd95_mm"] == INF


@pytest.mark.parametrize("first", [2, 3], ids=["no mask", "no scan"])
def test_without_any_mask_there_is_no_mean_and_no_worst(notebook, scored, first):
    table = notebook.add_mean_and_worst(scored[first:].reset_index(drop=True)).set_index("scan")
    assert list(table.index) == ["p3", "mean", "worst"][first - 2 :]
    assert table.dice.isna().all()


SPACING_MM = np.array([3.0, 1.0, 1.5])


def ball(radius_mm, centre_mm=(60, 40, 45), shape=(40, 80, 60)):
    """Return a ball, (slices, rows, columns) bool, of voxels of SPACING_MM."""
    places_mm = (np.indices(shape).T + 0.5) * SPACING_MM
    distances_mm = np.linalg.norm(places_mm - centre_mm, axis=-1).T
    return distances_mm < radius_mm


@pytest.fixture
def draw(notebook):
    """Return a function that draws a liver, on a scan without anything, and returns its axes."""

    def draw_liver(predicted, reference):
        scan = np.zeros(predicted.shape, np.uint8)
        figure = notebook.draw_in_3d(scan, predicted, reference, SPACING_MM, "p1")
        figure.canvas.draw()
        return [axes for part in figure.subfigs for axes in part.axes]

    yield draw_liver
    notebook.plt.close("all")


def test_the_planes_show_right_on_the_left_and_the_front_and_the_head_on_top(draw):
    # predicted is 12 mm above, before and to the patient's right of the reference: to the left and
    # up in the axial and the coronal plane, and in the sagittal one, where the front is on the left
    drawn = draw(ball(20, (62, 33, 43)), ball(20, (50, 45, 55)))
    for axes in drawn[:3]:
        places = {}
        for drawing in axes.collections:
            line = np.concatenate([path.vertices for path in drawing.get_paths()])
            on_screen = axes.transData.transform(line)  # right and up, in pixels
            colour = tuple(drawing.get_edgecolor()[0][:3])
            places[colour] = (on_screen.min(axis=0) + on_screen.max(axis=0)) / 2
        yellow, cyan = places[1, 1, 0], places[0, 1, 1]
        assert yellow[0] < cyan[0] and yellow[1] > cyan[1]
    letters = ["".join(text.get_text() for text in axes.texts) for axes in drawn[:5]]
    assert letters == ["RLAP", "RLSI", "APSI", "RLSI", "PASI"]


def silhouette(axes):
    """Return where the liver's surface is seen on the screen, (points, 2), right and up, pixels."""
    rows, columns = np.nonzero(axes.images[0].get_array()[..., 3])
    return axes.transData.transform(np.column_stack([columns, rows]))


def test_the_proportions_are_those_in_mm(draw):
    *planes, front, side, _ = draw(ball(25), ball(25))
    for axes in planes:  # the outline of a ball is as wide as high
        (line, *_) = (drawing.get_paths() for drawing in axes.collections)
        sides = np.ptp(axes.transData.transform(np.concatenate([p.vertices for p in line])), axis=0)
        assert sides[0] == pytest.approx(sides[1], rel=0.1)
    for axes in (front, side):
        sides = np.ptp(silhouette(axes), axis=0)
        assert sides[0] == pytest.approx(sides[1], rel=0.1)


def test_the_surface_is_seen_from_the_front_and_from_the_patients_right(draw):
    # a liver of two balls: the larger one lies to the right, to the front and on top
    liver = ball(20, (90, 25, 25)) | ball(10, (30, 60, 70))
    _, _, _, front, side = draw(liver, None)
    for axes, large_on_the_right in ((front, False), (side, True)):  # where then is the front
        points = silhouette(axes)
        is_up = points[:, 1] > np.mean([points[:, 1].min(), points[:, 1].max()]) - 1
        up, down = points[is_up], points[~is_up]
        assert len(up) > 2 * len(down)
        assert (up[:, 0].mean() > down[:, 0].mean()) == large_on_the_right


def test_what_lies_outside_the_reference_is_red_and_what_lies_inside_is_blue(draw):
    for radius_mm, redder in ((26, True), (14, False)):
        for axes in draw(ball(radius_mm), ball(20))[3:5]:
            picture = axes.images[0].get_array()
            red, _, blue = picture[picture[..., 3] > 0, :3].mean(axis=0)
            assert (red > 1.3 * blue) == redder and (blue > 1.3 * red) != redder


def test_the_distance_of_the_surface_is_in_mm_and_light_comes_from_above_front_and_right(notebook):
    for radius_mm in (26, 14):
        solid, lit, away_mm = notebook.find_surface([ball(radius_mm), ball(20)], SPACING_MM)
        edge = solid & ~ndimage.binary_erosion(solid)
        assert away_mm[edge].mean() == pytest.approx(radius_mm - 20, abs=1.5)
        slices, rows, columns = np.indices(solid.shape) - np.reshape(solid.shape, (3, 1, 1, 1)) // 2
        for is_lit in (slices > 0, rows < 0, columns < 0):
            assert lit[edge & is_lit].mean() > lit[edge & ~is_lit].mean()


@pytest.mark.parametrize(
    ("predicted", "reference"), [(0, None), (0, 0), (0, 20), (20, None), (2, 20), (20, 0)]
)
@pytest.mark.parametrize("slices", [slice(None), slice(20, 21)], ids=["whole", "one slice"])
def test_an_empty_or_tiny_or_flat_mask_is_drawn_too(draw, predicted, reference, slices):
    reference = None if reference is None else ball(reference)[slices]
    drawn = draw(ball(predicted)[slices], reference)
    assert len(drawn) == (5 if reference is None else 6)  # with the scale in mm
