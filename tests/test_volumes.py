"""Masks back on the voxels of their scans, their scores and pictures, on hand-made volumes."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import body_and_liver, save, save_patient
from test_data import ALL_AXES, OBLIQUE

import data

INF = float("inf")


def dice(a, b):
    return 2 * np.logical_and(a, b).sum() / (np.count_nonzero(a) + np.count_nonzero(b))


def export(notebook, root, size, largest_piece=True):
    """Slice raw/test, stack its masks as if they were predictions; return the table of Dice."""
    (root / "preds").mkdir(exist_ok=True)
    data.main(["--only", "test", "--size", str(size)])
    _, masks, slices = data.load_test_data()
    return notebook.export_patients(masks * np.float16(0.9), slices, "preds", 0, largest_piece)


@pytest.mark.parametrize("affine", [None, OBLIQUE], ids=["axial", "oblique"])
@pytest.mark.parametrize("axes", ALL_AXES)
def test_a_mask_that_is_not_resampled_comes_back_as_it_was(notebook, root, axes, affine):
    save_patient(root / "raw/test", axes=axes, affine=affine)
    steps = export(notebook, root, 32)
    assert steps.iloc[0].tolist() == ["p1", 1, 1, 1]
    reference = nib.load(root / "raw/test/p1_liver.nii.gz")
    written = nib.load(root / "preds/p1_liver.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(reference.dataobj))


@pytest.mark.parametrize("affine", [np.diag([-0.7, -0.9, 3, 1]), OBLIQUE], ids=["axial", "oblique"])
@pytest.mark.parametrize("axes", ["LAS", "PSR", "IRA"])
@pytest.mark.parametrize("shape", [(90, 64, 12), (40, 52, 9), (100, 100, 20)])
def test_a_resampled_mask_comes_back_at_a_dice_of_098(notebook, root, shape, axes, affine):
    grid = np.indices(shape).T - (np.array(shape) - 1) / 2
    ball = ((grid / (np.array(shape) * 0.4)) ** 2).sum(axis=-1).T < 1
    save(root / "raw/test/p1_orig.nii.gz", ball * 1100 - 1000, affine, axes, np.int16)
    save(root / "raw/test/p1_liver.nii.gz", ball, affine, axes, np.uint8)
    export(notebook, root, 64)
    written, reference = "preds/p1_liver.nii.gz", "raw/test/p1_liver.nii.gz"
    assert dice(data.read_mask(written), data.read_mask(reference)) >= 0.98


def headers_of(image):
    header = image.header
    codes = int(header["sform_code"]), int(header["qform_code"]), header.get_xyzt_units()
    return image.shape, nib.aff2axcodes(image.affine), codes, type(image)


@pytest.mark.parametrize("codes", [(1, 1), (2, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1)])
def test_the_header_is_the_scans(root, shape, kind, codes):
    scan = kind(np.full(shape, -1000, np.int16), OBLIQUE)
    scan.set_sform(OBLIQUE, codes[0])
    scan.set_qform(OBLIQUE, codes[1])
    scan.header.set_xyzt_units("mm", "sec")
    scan.header.set_slope_inter(2, -24)
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
    scan.header["descrip"] = scan.header["aux_file"] = b"Doe^Jane"
    nib.save(scan, root / "a_orig.nii.gz")
    mask = np.zeros((5, 6, 7), bool)
    mask[1, 2, 3] = True
    data.write_mask(root / "a_liver.nii.gz", mask, "a_orig.nii.gz")
    scan, written = nib.load(root / "a_orig.nii.gz"), nib.load(root / "a_liver.nii.gz")
    assert headers_of(written) == headers_of(scan)
    np.testing.assert_array_equal(written.affine, scan.affine)
    np.testing.assert_array_equal(written.header.get_zooms(), scan.header.get_zooms())
    assert written.get_data_dtype() == np.uint8 and not written.header.extensions
    assert written.header["descrip"] == written.header["aux_file"] == b""
    np.testing.assert_array_equal(np.asarray(written.dataobj).reshape(5, 6, 7), mask)


def test_a_mask_of_another_shape_is_not_written(root):
    save(root / "a_orig.nii.gz", body_and_liver()[0])
    with pytest.raises(ValueError, match="a_orig.nii.gz is 32 x 32 x 6 but its mask is 6 x 32 x"):
        data.write_mask(root / "a_liver.nii.gz", np.zeros((6, 32, 32), bool), "a_orig.nii.gz")


def test_a_mask_is_written_whole_or_not_at_all(root, monkeypatch):
    image, liver = body_and_liver()
    save(root / "a_orig.nii.gz", image)
    (root / "a_liver.nii.gz").write_bytes(b"of an earlier run")

    def disk_full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(nib.Nifti1Image, "to_stream", disk_full)
    with pytest.raises(OSError, match="No space left"):
        data.write_mask(root / "a_liver.nii.gz", liver, "a_orig.nii.gz")
    assert (root / "a_liver.nii.gz").read_bytes() == b"of an earlier run"
    assert not (root / ".a_liver.nii.gz").exists()


@pytest.mark.parametrize("axes", ["LPS", "RSA", "IPL"])
def test_a_volume_stands_up_with_its_voxel_sizes(root, axes):
    path = save(root / "a_orig.nii.gz", body_and_liver()[0], np.diag([-0.7, -0.9, 3, 1]), axes)
    stored = np.asarray(nib.load(path).dataobj)
    stack, spacing_mm = data.stand_up(stored, path)
    np.testing.assert_array_equal(stack, body_and_liver()[0].transpose(2, 1, 0))
    assert spacing_mm == pytest.approx([3, 0.9, 0.7])
    assert np.shares_memory(stack, stored)


def block_with_extras():
    """Return (slices, rows, columns) with a block of 5 x 5 x 5 that has a cavity and a tunnel."""
    stack = np.zeros((9, 9, 12), np.uint8)
    stack[1:6, 1:6, 1:6] = 1
    stack[2, 2, 2] = 0  # closed on all sides
    stack[3:, 4, 4] = 0  # leads out through the last slices, like a vessel
    stack[7, 7, 8:11] = 1  # a small piece apart
    return stack


def test_the_largest_piece_is_kept(notebook):
    stack = block_with_extras()
    expected = stack.copy()
    expected[7] = 0
    notebook.keep_largest_piece(stack)
    np.testing.assert_array_equal(stack, expected)


def test_cavities_are_filled_and_tunnels_are_not(notebook):
    stack = block_with_extras()
    expected = stack.copy()
    expected[2, 2, 2] = 1
    notebook.fill_cavities(stack)
    np.testing.assert_array_equal(stack, expected)


@pytest.mark.parametrize("axes", ["LPS", "SRA"])
def test_the_table_says_what_each_step_does_to_the_dice(notebook, root, axes):
    found, truth = block_with_extras(), np.zeros((9, 9, 12), np.uint8)  # (slices, rows, columns)
    truth[1:6, 1:6, 1:6] = 1
    truth[3:, 4, 4] = 0
    image = np.full((12, 9, 9), -1000, np.int16)
    save(root / "a_orig.nii.gz", image, axes=axes)
    save(root / "a_liver.nii.gz", truth.transpose(2, 1, 0), axes=axes)
    picture = np.zeros((9, 12, 12))
    picture[:, 1:10] = found  # 9 rows in a picture of 12
    slices = pd.DataFrame(
        {"patient": ["a"] * 9, "image": "a_orig.nii.gz", "mask": "a_liver.nii.gz"}
    )
    (root / "preds").mkdir()
    steps = notebook.export_patients(picture, slices, "preds", 0, False)
    assert list(steps) == ["patient", "as predicted", "cavities filled"]
    steps = notebook.export_patients(picture, slices, "preds", 0, True).iloc[0]
    # the truth has 125 - 3 = 122 voxels, the prediction one less and three apart
    assert steps["as predicted"] == pytest.approx(2 * 121 / (122 + 124))
    assert steps["largest piece"] == pytest.approx(2 * 121 / (122 + 121))
    assert steps["cavities filled"] == 1
    written = data.stand_up(data.read_mask("preds/a_liver.nii.gz"), "a_orig.nii.gz")[0]
    np.testing.assert_array_equal(written, truth)


@pytest.mark.parametrize("axes", ["LPS", "SRA"])
def test_probabilities_are_smoothed_from_slice_to_slice_in_mm(notebook, root, axes):
    save(root / "a_orig.nii.gz", body_and_liver((32, 32, 7))[0], axes=axes)  # 2 mm a slice
    stack = np.zeros((7, 32, 32), np.float16)
    stack[:, 4:8, 4:8] = 1
    stack[3, 4:8, 4:8] = 0  # missed in one slice
    stack[3, 20:24, 20:24] = 1  # found in one slice
    stack[:2, 12:16, 12:16] = 1  # up to the end of the scan
    weights = np.exp(-0.5 * (np.arange(-5, 6) * 2 / 3) ** 2)  # of a Gaussian with a sigma of 3 mm
    centre, second = weights[5] / weights.sum(), weights[6] / weights.sum()
    assert centre < 0.5 < centre + 2 * second  # so one slice of seven never decides
    steps = dict(notebook.make_mask(stack, "a_orig.nii.gz", 3, False))
    assert list(steps) == ["as predicted", "smoothed", "cavities filled"]
    raw, smooth = (data.stand_up(steps[name], "a_orig.nii.gz")[0] for name in list(steps)[:2])
    np.testing.assert_array_equal(raw, stack)
    expected = np.zeros((7, 32, 32))
    expected[:, 4:8, 4:8] = 1
    expected[:2, 12:16, 12:16] = 1
    np.testing.assert_array_equal(smooth, expected)


def test_nothing_found_is_exported_too(notebook, root):
    save(root / "a_orig.nii.gz", body_and_liver()[0])
    slices = pd.DataFrame({"patient": ["a"] * 6, "image": "a_orig.nii.gz", "mask": ""})
    notebook.export_patients(np.zeros((6, 32, 32)), slices, root, 5, True)
    assert not data.read_mask("a_liver.nii.gz").any()


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
        scores = notebook.score_volume(one_voxel(*other), one_voxel(0, 2, 3), spacing_mm)
        assert scores["assd_mm"] == scores["hd95_mm"] == pytest.approx(apart_mm)
        assert scores["rvd_percent"] == 0
        assert scores["voe_percent"] == (100 if apart_mm else 0)


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
            scores = notebook.score_volume(*pair, np.array([3.0, 1.0, 1.0]))
            assert scores["hd95_mm"] == apart_mm
            assert scores["assd_mm"] == pytest.approx(assd_mm)


def test_a_shifted_cube_has_the_distances_worked_out_by_hand(notebook):
    cube, shifted = np.zeros((2, 6, 6, 6), bool)
    cube[:3, 1:4, 1:4] = shifted[1:4, 1:4, 1:4] = True
    scores = notebook.score_volume(shifted, cube, np.array([3.0, 1.0, 2.0]))
    # 26 of 27 voxels are surface, all but the middle one. From either cube 9 of them lie one slice
    # of 3 mm off; 16 lie on the other surface; one faces the other's middle, 1 mm from the next row
    assert scores["assd_mm"] == pytest.approx((9 * 3 + 1) / 26)
    assert scores["hd95_mm"] == 3
    assert scores["dice"] == pytest.approx(18 / 27)
    assert scores["voe_percent"] == pytest.approx(100 * (1 - 18 / 36))
    assert scores["rvd_percent"] == 0


def test_the_surface_is_what_shares_a_face_or_an_edge_with_the_outside(notebook):
    stack = np.ones((3, 3, 3), bool)
    assert len(notebook.surface_mm(stack, np.ones(3))) == 26  # beyond the volume is outside
    stack = np.ones((5, 5, 5), bool)
    stack[0, 0, 0] = stack[4, 0, 2] = False
    inner = np.zeros((5, 5, 5), bool)
    inner[1:4, 1:4, 1:4] = True  # the corner missing at 0 0 0 touches 1 1 1 by its tip alone
    inner[3, 1, 2] = False  # shares an edge with 4 0 2
    places = notebook.surface_mm(stack, np.array([3.0, 1.0, 2.0]))
    np.testing.assert_array_equal(places, np.argwhere(stack & ~inner) * [3, 1, 2])


def test_volumes_that_differ_in_size_alone(notebook):
    cube, half = np.zeros((2, 6, 6, 6), bool)
    cube[1:5, 1:5, 1:5], half[1:3, 1:5, 1:5] = True, True
    assert notebook.score_volume(half, cube, np.ones(3))["rvd_percent"] == -50
    assert notebook.score_volume(cube, half, np.ones(3))["rvd_percent"] == 100
    assert notebook.score_volume(cube, half, np.ones(3))["voe_percent"] == 50


@pytest.mark.parametrize(
    ("predicted", "reference", "known"),
    [
        (False, False, [1, 0, 0, 0, 0]),
        (False, True, [0, 100, -100, INF, INF]),
        (True, False, [0, 100, INF, INF, INF]),
        (True, True, [1, 0, 0, 0, 0]),
    ],
)
def test_empty_masks_have_known_scores(notebook, predicted, reference, known):
    one, other = one_voxel(1, 1, 1) & predicted, one_voxel(1, 1, 1) & reference
    assert list(notebook.score_volume(one, other, np.ones(3)).values()) == known


@pytest.fixture
def scored(notebook, root):
    """Return the scores of p1 (as its reference), p2 (one slice of two too few), p3 (no mask)."""
    for name in ("p1", "p2", "p3"):
        save_patient(root / "raw/test", name, axes="RSA", mask=name != "p3")
    data.main(["--only", "test", "--size", "32"])
    _, masks, slices = data.load_test_data()
    predicted = np.concatenate([masks[:12], masks[:6]])
    predicted[6 + 2] = 0  # p2's first of three slices, 10 x 10 voxels of 1 x 1 x 2 mm each
    (root / "preds").mkdir()
    notebook.export_patients(predicted, slices, "preds", 0, True)
    return notebook.score_patients(slices, "preds")


def test_patients_are_scored_on_their_own_grid(scored):
    p1, p2, _ = scored.to_dict("records")
    assert p1["dice"] == 1 and p1["hd95_mm"] == 0 and p1["liver_ml"] == 0.6
    assert p2["dice"] == pytest.approx(2 * 200 / (200 + 300))
    assert p2["voe_percent"] == pytest.approx(100 / 3)
    assert p2["rvd_percent"] == pytest.approx(-100 / 3)
    assert p2["hd95_mm"] == 2
    assert (p2["liver_ml"], p2["reference_ml"]) == (0.4, 0.6)


def test_a_scan_without_mask_is_exported_and_left_out_of_the_scores(notebook, scored, root):
    p3 = scored.set_index("patient").loc["p3"]
    assert p3.slices == 6 and p3.liver_ml == 0.6
    assert p3.drop(["slices", "liver_ml"]).isna().all()
    table = notebook.add_mean_and_worst(scored).set_index("patient")
    assert table.loc["mean", "dice"] == pytest.approx((1 + 0.8) / 2)
    assert table.loc["mean", "liver_ml"] == pytest.approx(0.5)  # of the two that are scored
    assert (root / "preds/p3_liver.nii.gz").exists()


def test_the_table_names_who_is_worst_in_what(notebook):
    scores = pd.DataFrame(
        {"patient": ["a", "b"], "slices": 9, "dice": [0.9, 0.8], "voe_percent": [18, 33]}
        | {"rvd_percent": [-12, 2], "assd_mm": [1, 3], "hd95_mm": [9, 8]}
    )
    table = notebook.add_mean_and_worst(scores).set_index("patient")
    assert table.loc["a", "worst_in"] == "rvd_percent hd95_mm"
    assert table.loc["b", "worst_in"] == "dice voe_percent assd_mm"
    worst = table.loc["worst", "dice":"hd95_mm"].tolist()
    assert worst == [0.8, 33, -12, 3, 9]
    assert table.loc["mean", "rvd_percent"] == pytest.approx(-5)


def test_a_liver_that_was_missed_does_not_vanish_from_the_mean(notebook):
    scores = pd.DataFrame(
        {"patient": ["a", "b"], "slices": 9, "dice": [0.9, 0], "voe_percent": [18.0, 100]}
        | {"rvd_percent": [1.0, -100], "assd_mm": [1, INF], "hd95_mm": [3, INF]}
    )
    table = notebook.add_mean_and_worst(scores).set_index("patient")
    assert table.loc["mean", "assd_mm"] == table.loc["worst", "hd95_mm"] == INF
    assert table.loc["b", "worst_in"].split()[-1] == "hd95_mm"


def test_without_any_mask_there_is_no_mean_and_no_worst(notebook, scored):
    table = notebook.add_mean_and_worst(scored[2:].reset_index(drop=True)).set_index("patient")
    assert list(table.index) == ["p3", "mean", "worst"]
    assert table.dice.isna().all() and table.loc["p3", "liver_ml"] == 0.6


SPACING_MM = np.array([3.0, 1.0, 1.5])


def ball(radius_mm, centre_mm=(60, 40, 45), shape=(40, 80, 60)):
    """Return a ball, (slices, rows, columns) bool, of voxels of SPACING_MM."""
    places_mm = (np.indices(shape).T + 0.5) * SPACING_MM
    distances_mm = np.linalg.norm(places_mm - centre_mm, axis=-1).T
    return distances_mm < radius_mm


def test_the_surface_of_a_ball_is_round_in_mm_and_its_normals_point_outwards(notebook):
    vertices, normals, faces = notebook.liver_surface(ball(25), SPACING_MM)
    outwards = vertices - [60, 40, 45]
    distances_mm = np.linalg.norm(outwards, axis=1)
    assert np.abs(distances_mm - 25).max() < 1.5
    assert ((outwards * normals).sum(axis=1) > 0.9 * distances_mm).all()
    assert faces.max() < len(vertices)


def test_distances_to_the_reference_are_below_zero_inside_it(notebook):
    small, large = (notebook.liver_surface(ball(r), SPACING_MM) for r in (20, 26))
    np.testing.assert_allclose(notebook.signed_distances(large, small), 6, atol=1.5)
    np.testing.assert_allclose(notebook.signed_distances(small, large), -6, atol=1.5)
    assert not notebook.signed_distances(small, small).any()


@pytest.fixture
def drawn(notebook):
    """Return the five pictures of a ball that lies to the right, front and top of the reference.

    Its middle is 12 mm above, before and to the patient's right of the reference's.
    """
    scan = np.zeros((40, 80, 60), np.uint8)
    reference, predicted = ball(20, (50, 45, 55)), ball(20, (62, 33, 43))
    figure = notebook.draw_in_3d(scan, predicted, reference, SPACING_MM, "p1")
    figure.canvas.draw()
    yield [axes for part in figure.subfigs for axes in part.axes]
    notebook.plt.close(figure)


def middle_on_screen(axes, points):
    """Return where the middle of points in data coordinates lies, (right, up) in pixels."""
    ends = np.array([np.min(points, axis=0), np.max(points, axis=0)])
    return axes.transData.transform(ends).mean(axis=0)


def test_the_planes_show_right_on_the_left_and_the_front_and_the_head_on_top(drawn):
    # in the axial plane the ball lies to the left and up, in the coronal one too, in the sagittal
    # plane to the left and up: the front is on the left
    for axes in drawn[:3]:
        outlines = {
            tuple(drawing.get_edgecolor()[0][:3]): np.concatenate(
                [path.vertices for path in drawing.get_paths()]
            )
            for drawing in axes.collections
        }
        yellow, cyan = (middle_on_screen(axes, outlines[c]) for c in [(1, 1, 0), (0, 1, 1)])
        assert yellow[0] < cyan[0] and yellow[1] > cyan[1]


def test_the_letters_name_the_patients_sides(drawn):
    letters = ["".join(text.get_text() for text in axes.texts) for axes in drawn[:5]]
    assert letters == ["RLAP", "RLSI", "APSI", "RLSI", "PASI"]


def test_the_proportions_are_those_in_mm(drawn):
    assert [axes.get_aspect() for axes in drawn[:5]] == [1] * 5
    left, right, bottom, top = drawn[1].images[0].get_extent()
    # 30 mm around both: columns of 1.5 mm, slices of 3 mm, cut off where the volume ends
    assert right - left == pytest.approx(90) and top - bottom == pytest.approx(112, abs=6)


def test_the_surface_is_seen_from_the_front_and_from_the_patients_right(notebook):
    # a liver of two balls: the larger one lies to the right, to the front and on top
    liver = ball(20, (90, 25, 25)) | ball(10, (30, 60, 70))
    figure = notebook.plt.figure()
    notebook.draw_surfaces(figure, liver, None, SPACING_MM)
    front, side = figure.axes
    for axes, sign in (
        (front, -1),
        (side, 1),
    ):  # the front is to the right when seen from the right
        corners = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])
        large, small = np.sort(corners[:, 1])[[-1, 0]]
        top, bottom = corners[corners[:, 1] > 60], corners[corners[:, 1] < 60]
        assert np.ptp(top[:, 1]) > np.ptp(bottom[:, 1]) and large > small
        assert np.sign(top[:, 0].mean() - bottom[:, 0].mean()) == sign
    notebook.plt.close(figure)


@pytest.mark.parametrize("predicted", [0, 1, 20])
@pytest.mark.parametrize("reference", [None, 0, 20])
def test_an_empty_or_tiny_mask_is_drawn_too(notebook, tmp_path, predicted, reference):
    scan = np.zeros((40, 80, 60), np.uint8)
    reference = None if reference is None else ball(reference)
    figure = notebook.draw_in_3d(scan, ball(predicted), reference, SPACING_MM, "p1")
    figure.savefig(tmp_path / "p1.png")
    assert len(figure.subfigs[1].axes) == (2 if reference is None else 3)  # with the scale in mm
    notebook.plt.close(figure)


@pytest.mark.parametrize("reference", [None, 20])
def test_a_scan_of_one_slice_is_drawn_too(notebook, tmp_path, reference):
    scan, predicted = np.zeros((1, 80, 60), np.uint8), ball(20)[20:21]
    assert predicted.any()
    reference = None if reference is None else ball(reference)[20:21]
    figure = notebook.draw_in_3d(scan, predicted, reference, SPACING_MM, "p1")
    figure.savefig(tmp_path / "p1.png")
    notebook.plt.close(figure)


def test_gray_values_of_a_scan_stand_upright(root):
    save(root / "a_orig.nii.gz", body_and_liver()[0], axes="PIR")
    gray = data.read_gray("a_orig.nii.gz")
    expected = data.to_gray(body_and_liver()[0].transpose(2, 1, 0).astype(np.float32))
    np.testing.assert_array_equal(gray, expected)


def save_slope(root, shape=(40, 48, 30), affine=None, axes="LPS"):
    """Write a patient whose HU are -160 + x + 2 y + 3 z mm to the left, back and head.

    Counted from the first voxel; the liver is the voxels within 12 mm of the middle.
    """
    affine = np.diag([-1.0, -1.0, 2.0, 1.0]) if affine is None else affine
    x, y, z = (np.indices(shape).T * np.abs(np.diag(affine)[:3])).T
    middle_mm = (np.array(shape) - 1) / 2 * np.abs(np.diag(affine)[:3])
    liver = sum((a - m) ** 2 for a, m in zip((x, y, z), middle_mm, strict=True)) < 12**2
    slope = np.rint(-160 + x + 2 * y + 3 * z).astype(np.int16)
    save(root / "raw/train/p1_orig.nii.gz", slope, affine, axes)
    save(root / "raw/train/p1_liver.nii.gz", liver, affine, axes, np.uint8)


def lean(family):
    """Return the family's axis, rows and columns in mm along the patient's L, P and S."""
    cos, sin = np.cos(np.pi / 9), np.sin(np.pi / 9)
    return {
        1: ([0, sin, cos], [0, cos, -sin], [1, 0, 0]),  # towards the back
        2: ([sin, 0, cos], [0, 1, 0], [cos, 0, -sin]),  # towards the left
        3: ([0, -sin, cos], [0, cos, sin], [1, 0, 0]),
        4: ([-sin, 0, cos], [0, 1, 0], [cos, 0, sin]),
    }[family]


@pytest.mark.parametrize("family", [1, 2, 3, 4])
@pytest.mark.parametrize("spacing_mm", [(1, 1, 2), (0.5, 1.5, 3)])
def test_tilted_slices_hold_what_lies_there_in_mm(root, family, spacing_mm):
    save_slope(root, (48, 16 * 3, 30), np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1]))
    image = nib.load(root / "raw/train/p1_orig.nii.gz")
    raw = np.asarray(image.dataobj)
    slices = list(data.cut(raw, image, [family], outside=-1000))
    numbers = data.slice_numbers(image, family)
    assert len(slices) == len(numbers) > 20
    upwards, back, left = (np.array(axis) for axis in lean(family))
    sides_mm = np.array(raw.shape) - 1
    for number, pixels in zip(numbers, slices, strict=True):
        row, column = np.indices(pixels.shape).astype(float)[..., None] - 23.5
        offset_mm = (number - 14.5) * spacing_mm[2] * upwards
        place_mm = offset_mm + row * spacing_mm[1] * back + column * spacing_mm[0] * left
        voxel = place_mm / spacing_mm + sides_mm / 2
        expected = -160 + (voxel * spacing_mm) @ [1, 2, 3]
        inside = ((voxel >= 0) & (voxel <= sides_mm)).all(axis=-1)
        assert np.abs(pixels - expected)[inside].max() < 1  # HU are stored rounded
        assert (pixels[((voxel < -0.5) | (voxel > sides_mm + 0.5)).any(axis=-1)] == -1000).all()


@pytest.mark.parametrize("axes", ALL_AXES)
def test_every_storage_order_gives_the_same_tilted_slices(root, axes):
    found = []
    for stored in ("LPS", axes):
        save_slope(root, axes=stored)
        data.main(["--size", "32", "--oblique", "2"])
        imgs, masks, slices = data.load_train_data()
        tilted = slices.family > 0
        assert slices.family.unique().tolist() == [0, 1, 2]
        found.append((imgs[tilted].copy(), masks[tilted].copy()))
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_allclose(found[0][0].astype(int), found[1][0], atol=1)


def test_tilted_slices_of_a_ball_hold_the_same_ball(root):
    save_slope(root)
    data.main(["--size", "48", "--oblique", "4"])
    _, masks, slices = data.load_train_data()
    assert set(np.unique(masks)) == {0, 1}
    volumes = masks.sum(axis=(1, 2)).astype(int)
    for family in range(1, 5):
        ml = volumes[slices.family == family].sum()
        assert ml == pytest.approx(volumes[slices.family == 0].sum(), rel=0.03)
    middle = slices[(slices.slice == 15) & (slices.liver == 1)]
    assert sorted(middle.family) == [0, 1, 2, 3, 4]
    places = np.array([np.argwhere(masks[n]).mean(axis=0) for n in middle.index])
    np.testing.assert_allclose(places, 23.5, atol=1)  # the middle stays in the middle


def test_only_training_scans_are_cut_obliquely_and_the_table_says_so(root, capsys):
    save_slope(root)
    save_patient(root / "raw/test", "t")
    data.main(["--size", "32", "--oblique", "1"])
    train, test = data.load_train_data().slices, data.load_test_data().slices
    oblique = (train.family == 1).sum()
    assert len(train) == 30 + oblique and (test.family == 0).all()
    assert train.slice[train.family == 1].is_monotonic_increasing
    assert f"{oblique} oblique" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((100, 100, 200), range(5, 195)),  # worked out by hand: the ends leave it at the back
        ((100, 100, 17), []),  # a plane of 100 mm that leans by 20 degrees takes 34 mm of height
        ((100, 100, 18), range(18)),
    ],
)
def test_slices_that_leave_the_volume_for_the_larger_part_are_dropped(shape, numbers):
    image = nib.Nifti1Image(np.zeros(shape, np.int16), np.diag([-1, -1, 1, 1]))
    for family in (1, 2, 3, 4):
        assert data.slice_numbers(image, family) == list(numbers)


@pytest.mark.parametrize("families", ["-1", "5", "two"])
def test_a_number_of_families_that_there_is_not_is_refused(root, families, capsys):
    with pytest.raises(SystemExit):
        data.main([f"--oblique={families}"])
    assert "--oblique" in capsys.readouterr().err


SCANS = {
    "cubes": ((64, 64, 64), [1, 1, 1]),
    "flat voxels": ((60, 64, 40), [0.8, 0.8, 2.5]),
    "not square": ((72, 48, 40), [0.7, 1.3, 2]),
}


def save_balls(root, shape, spacing_mm, axes):
    """Write a scan in raw/test whose liver, two balls that touch, is brighter than the rest."""
    places_mm = ((np.indices(shape).T - (np.array(shape) - 1) / 2) * spacing_mm).T
    side_mm = (np.array(shape) * spacing_mm).min()
    liver = np.zeros(shape, bool)
    for middle, radius in {(-0.1, -0.1, 0): 0.24, (0.12, 0.05, 0.1): 0.15}.items():
        apart_mm = places_mm - side_mm * np.reshape(middle, (3, 1, 1, 1))
        liver |= (apart_mm**2).sum(axis=0) < (radius * side_mm) ** 2
    affine = np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1])
    image = np.where(liver, 240, -160)
    save(root / "raw/test/p1_orig.nii.gz", image, affine, axes, np.int16)
    save(root / "raw/test/p1_liver.nii.gz", liver, affine, axes, np.uint8)


@pytest.mark.parametrize("axes", ["LPS", "RSA", "AIL"])
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("family", [1, 2, 3, 4])
def test_a_mask_that_is_cut_obliquely_and_turned_back_keeps_a_dice_of_098(root, scan, family, axes):
    save_balls(root, *SCANS[scan], axes)
    tilted = data.slice_view("raw/test/p1_orig.nii.gz", 64, family) / 255  # gray 255 is liver
    view = data.turn_back(tilted, "raw/test/p1_orig.nii.gz", family)
    back = data.restore(np.nan_to_num(view), "raw/test/p1_orig.nii.gz")
    assert dice(back, data.read_mask("raw/test/p1_liver.nii.gz")) >= 0.98


def test_a_view_that_there_is_not_is_refused(root):
    save_balls(root, *SCANS["cubes"], "LPS")
    for family in (0, 5):
        with pytest.raises(ValueError, match=f"no tilted view {family}: data.py has 1 to 4"):
            data.slice_view("raw/test/p1_orig.nii.gz", 64, family)


def test_where_no_tilted_slice_passes_nothing_is_known(root):
    save_balls(root, *SCANS["cubes"], "LPS")
    path = "raw/test/p1_orig.nii.gz"
    view = data.turn_back(np.ones_like(data.slice_view(path, 64, 1)), path, 1)
    # P mm behind the middle in the last slice, 31.5 mm above it, lies at row P cos - 31.5 sin of a
    # slice that leans by 20 degrees; those below -31.5 are missed: up to P = -22.1, row 9
    known = ~np.isnan(view)
    assert known[32].all()
    assert not known[-1, :10].any() and known[-1, 10:30].all()
    assert not known[0, -10:].any() and known[0, -30:-10].all()
    assert (view[known] == 1).all()


class Brightness:
    """Stands for a network: the probability of liver is the gray value over 255."""

    def predict(self, batches, verbose):
        return np.concatenate([batches[n][0] for n in range(len(batches))]) / 255


def test_views_are_averaged_where_they_pass(notebook, root):
    save_balls(root, *SCANS["flat voxels"], "LPS")
    data.main(["--only", "test", "--size", "64"])
    imgs, _, slices = data.load_test_data()
    probabilities = np.zeros(imgs.shape, np.float16)  # the axial view found nothing
    notebook.add_views(Brightness(), probabilities, slices, 4, 10)
    assert probabilities[19, 25, 25] == pytest.approx(4 / 5, abs=1e-3)  # in the larger ball
    assert probabilities[19, 60, 60] == 0
    probabilities[:] = imgs / 255
    notebook.add_views(Brightness(), probabilities, slices, 4, 10)
    back = data.restore(probabilities, slices.image[0])
    assert dice(back, data.read_mask(slices["mask"][0])) >= 0.98


def test_a_scan_too_flat_for_tilted_slices_keeps_its_axial_view(notebook, root):
    save_patient(root / "raw/test", shape=(64, 64, 3))
    data.main(["--only", "test", "--size", "64"])
    imgs, _, slices = data.load_test_data()
    probabilities = (imgs / 255).astype(np.float16)
    before = probabilities.copy()
    notebook.add_views(Brightness(), probabilities, slices, 4, 10)
    np.testing.assert_array_equal(probabilities, before)
