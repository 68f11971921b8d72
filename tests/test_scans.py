"""raw/scans.py: which scans there are, whose they are, what is wrong or odd about them."""

import os
import unicodedata

import nibabel as nib
import numpy as np
import pytest
from conftest import OBLIQUE, body_and_liver, save

from raw import scans, volumes

LPS = np.diag([-1.0, -1.0, 2.0, 1.0])  # the affine of hand-made scans


def touch(root, *names):
    """Make empty files in raw/."""
    for name in names:
        path = root / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(only=None):
    """Return {split: [(scan, patient, image, mask)]} with paths from raw/split on."""
    splits, faults = scans.find_scans(only)
    assert faults == []
    below = {
        split: [
            (
                *files[:2],
                *(p and p.relative_to(scans.ROOT / "raw" / split).as_posix() for p in pair),
            )
            for files, pair in zip(of, (files[2:] for files in of), strict=True)
        ]
        for split, of in splits.items()
    }
    return below


def test_pairs_are_made_by_name_whatever_case_and_order(root):
    touch(root, "train/B_ORIG.nii", "train/b_Liver.nii.gz", "test/new_v2_orig.nii")
    touch(root, "train/a_orig.nii.gz", "train/a_LIVER.NII.GZ")
    touch(root, "train/volume-10.nii", "train/segmentation-10.nii.gz")
    assert found() == {
        "train": [
            ("a", "a", "a_orig.nii.gz", "a_LIVER.NII.GZ"),
            ("B", "B", "B_ORIG.nii", "b_Liver.nii.gz"),
            ("volume-10", "volume-10", "volume-10.nii", "segmentation-10.nii.gz"),
        ],
        "test": [("new_v2", "new_v2", "new_v2_orig.nii", None)],
    }


LAYOUTS = {  # image, mask, what the scan is called
    "LiTS": ("volume-7.nii", "segmentation-7.nii", "volume-7"),
    "LiTS, test": ("test-volume-7.nii", "test-segmentation-7.nii", "test-volume-7"),
    "decathlon": ("imagesTr/liver_7.nii.gz", "labelsTr/liver_7.nii.gz", "liver_7"),
    "nnU-Net": ("imagesTr/liver_7_0000.nii.gz", "labelsTr/liver_7.nii.gz", "liver_7"),
    "nnU-Net, test": ("imagesTs/liver_7_0000.nii.gz", "labelsTs/liver_7.nii", "liver_7"),
    "AMOS": ("imagesVa/amos_0007.nii.gz", "labelsVa/amos_0007.nii.gz", "amos_0007"),
    "numbered from 0": ("imagesTr/ct_0000_0000.nii.gz", "labelsTr/ct_0000.nii.gz", "ct"),
    "TotalSegmentator": ("s0007/ct.nii.gz", "s0007/segmentations/liver.nii.gz", "s0007"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_layouts_of_public_data_sets_are_known(root, capsys, case):
    image, mask, name = LAYOUTS[case]
    touch(root, f"test/{image}", f"test/{mask}")
    assert found("test")["test"] == [(name, name, image, mask)]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_mask_that_is_missing_is_named_by_where_it_should_be(root, case):
    image, mask, _ = LAYOUTS[case]
    touch(root, f"train/{image}")
    (files,) = scans.find_scans(None)[0]["train"]
    wanted = f"raw/train/{mask.split('.')[0].replace('_0000', '')}.nii"
    sentence = f"^raw/train/{image} has no liver mask: add {wanted}"
    with pytest.raises(FileNotFoundError, match=sentence):
        scans.check(files, "train", False)


def test_masks_of_other_organs_beside_a_liver_and_hidden_files_are_passed_over(root, capsys):
    touch(root, "test/s1/ct.nii.gz", "test/s1/segmentations/spleen.nii.gz")
    touch(root, "test/.p2_orig.nii", "test/imagesTr/._liver_0.nii.gz", "test/.git/a_orig.nii")
    assert found("test")["test"] == [("s1", "s1", "s1/ct.nii.gz", None)]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name",
    ["p1_bone.nii.gz", "p1_liver.nrrd", "p1_orig.nii.gz.part", "segmentations/p1_liver.nii.gz"],
)
def test_a_file_of_another_name_is_left_out_aloud(root, name, capsys):
    touch(root, "test/p1_orig.nii", f"test/{name}")
    assert len(found("test")["test"]) == 1
    wanted = "wanted raw/test/NAME_orig.nii.gz or raw/test/NAME_liver.nii.gz"
    said = f"raw/test/{name} is left out: {wanted}\n"
    assert capsys.readouterr().out == said


def test_many_files_of_other_names_are_a_line_a_folder(root, capsys):
    touch(root, "test/p1_orig.nii", "test/notes.txt", *(f"test/cd/{n:02}.dcm" for n in range(14)))
    assert len(found("test")["test"]) == 1
    notes, cd = capsys.readouterr().out.splitlines()
    assert notes.startswith("raw/test/notes.txt is left out")
    assert cd.startswith("raw/test/cd/00.dcm, 01.dcm, ") and "09.dcm and 4 more are left" in cd


def test_names_that_differ_only_in_how_unicode_spells_them_are_one(root):
    for form, kind in (("NFC", "orig"), ("NFD", "liver")):
        touch(root, f"train/{unicodedata.normalize(form, 'Müller')}_{kind}.nii")
    ((name, _, image, mask),) = found()["train"]
    assert name == unicodedata.normalize("NFC", "Müller") and image and mask
    touch(root, f"test/{unicodedata.normalize('NFD', 'müller')}_orig.nii")
    assert "of one patient, müller," in scans.find_scans(None)[1][0]


def test_volumes_and_tables_where_none_is_looked_for_are_said(root, capsys):
    touch(root, "test/p1_orig.nii", "p2_orig.nii.gz", "Train/set/p3_orig.nii", "patients.csv.txt")
    touch(root, "test/a/b/c/p4_orig.nii", "README.md", "ircad.py")
    assert len(found("test")["test"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" left out")[0] for line in said] == [
        "raw/test/a/b/c/p4_orig.nii is",
        "raw/p2_orig.nii.gz, patients.csv.txt are",
        "raw/Train/set/p3_orig.nii is",
    ]


def test_no_test_scans_is_said(root, capsys):
    touch(root, "train/p1_orig.nii", "train/p1_liver.nii")
    assert found()["test"] == []
    assert capsys.readouterr().out.startswith("raw/test holds no scans")


@pytest.mark.parametrize("only", [None, "test"])
def test_no_scans_where_they_are_wanted_is_refused(root, only):
    touch(root, *([] if only is None else ["train/p1_orig.nii", "train/p1_liver.nii"]))
    wanted = f"^raw/{only or 'train'} holds no volumes .* `python raw/phantom.py` for"
    with pytest.raises(FileNotFoundError, match=wanted):
        scans.find_scans(only)


def test_a_folder_that_is_not_there_holds_no_scans(root):
    (root / "raw/train").rmdir()
    with pytest.raises(FileNotFoundError, match="^raw/train holds no volumes"):
        scans.find_scans(None)


FAULTY = {
    "image without mask": (
        ["train/p1_orig.nii"],
        "raw/train/p1_orig.nii has no liver mask: add raw/train/p1_liver.nii, or move it to",
    ),
    "mask without image": (
        ["train/segmentation-1.nii"],
        "raw/train/segmentation-1.nii has no image: add raw/train/volume-1.nii",
    ),
    "test mask without image": (
        ["train/a_orig.nii", "train/a_liver.nii", "test/t_liver.nii.gz"],
        "raw/test/t_liver.nii.gz has no image: add raw/test/t_orig.nii.gz",
    ),
    "two images of a scan": (
        ["train/P1_orig.nii", "train/p1_orig.nii.gz", "train/p1_liver.nii"],
        "raw/train/p1_orig.nii.gz and P1_orig.nii are both the image of scan p1",
    ),
    "two masks of a scan": (
        ["train/p1_orig.nii", "train/p1_liver.nii", "train/p1_liver.nii.gz"],
        "raw/train/p1_liver.nii.gz and p1_liver.nii are both the mask of scan p1",
    ),
    "a scan in two layouts": (
        ["train/p1_orig.nii", "train/p1_liver.nii", "train/p1/ct.nii.gz"],
        "raw/train/p1/ct.nii.gz and p1_orig.nii are both the image of scan p1",
    ),
    "a patient in both splits": (
        ["train/p1_orig.nii", "train/p1_liver.nii", "test/P1_orig.nii"],
        "raw/test/P1_orig.nii and raw/train/p1_orig.nii are of one patient, P1, and a test on",
    ),
}


@pytest.mark.parametrize("case", FAULTY)
def test_files_that_make_no_scans_are_named(root, monkeypatch, case):
    names, sentence = FAULTY[case]
    touch(root, *names)
    monkeypatch.setattr(scans, "check_header", lambda path: None)
    monkeypatch.setattr(
        scans, "open_volume", lambda path: nib.Nifti1Image(np.zeros((1, 1, 1)), LPS)
    )
    splits, faults = scans.find_scans(None)
    for split, of in splits.items():
        scans.check_all(of, split, False, faults)
    assert len(faults) == 1 and faults[0].startswith(sentence)


def patients(root, *lines):
    (root / "raw/patients.csv").write_text("\n".join(lines), encoding="utf-8")


def test_a_table_says_which_scans_are_of_one_patient(root):
    touch(root, *(f"train/volume-{n}.nii" for n in (6, 8, 10, 11)))
    patients(
        root,
        "\ufeffscan,age,patient",
        "volume-6,50,Ada",
        "",
        "Volume-8,50,ada",
        "volume-10,51, Ada ",
    )
    assert [row[:2] for row in found()["train"]] == [
        ("volume-10", "Ada"),
        ("volume-11", "volume-11"),
        ("volume-6", "Ada"),
        ("volume-8", "Ada"),
    ]


def test_scans_of_one_patient_in_both_splits_are_refused(root):
    touch(root, "train/a1_orig.nii", "test/a2_orig.nii", "test/b_orig.nii")
    patients(root, "scan,patient", "a1,A", "a2,a")
    (fault,) = scans.find_scans(None)[1]
    assert fault.startswith(
        "raw/test/a2_orig.nii and raw/train/a1_orig.nii are of one patient, A, "
    )


def test_a_scan_in_the_table_that_is_not_there_is_said(root, capsys):
    touch(root, "train/a_orig.nii", "test/b_orig.nii")
    patients(root, "scan,patient", "c,C", "a,A")
    assert found()["train"][0][1] == "A"
    assert capsys.readouterr().out == "raw/patients.csv names scans that are not in raw/: c\n"


def test_a_table_may_give_files_and_be_of_windows(root):
    touch(root, "train/jörg1_orig.nii", "train/jörg2_orig.nii.gz")
    lines = "scan;patient\r\njörg1_orig.nii;Jörg\r\njörg2_liver.nii.gz;Jörg\r\n"
    (root / "raw/patients.csv").write_bytes(lines.encode("cp1252"))
    assert [row[1] for row in found()["train"]] == ["Jörg", "Jörg"]


def test_a_table_of_no_scan_that_is_there_is_refused(root):
    touch(root, "train/a_orig.nii", "test/b_orig.nii")
    patients(root, "scan,patient", "case_a,A", "case_b,A")
    (fault,) = scans.find_scans(None)[1]
    assert fault == (
        "raw/patients.csv names scans that are not in raw/: case_a, case_b; wanted names like a, b"
    )


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([""], "begins with [], wanted the line scan,patient"),
        (["scan\tpatient", "a\tA"], "begins with ['scan\\tpatient'], wanted the line scan,patient"),
        (["patient", "A"], "begins with ['patient'], wanted"),
        (["scan,patient", "a,A", "b"], "says b in row 3, wanted a scan and its patient"),
        (["scan,patient", "a,"], "says a, in row 2, wanted a scan and its patient"),
        (["scan,patient", "a,A", "A,B"], "says A,B in row 3, wanted .*, each scan once"),
    ],
)
def test_a_table_of_patients_that_cannot_be_is_refused_in_a_sentence(root, lines, sentence):
    touch(root, "train/a_orig.nii")
    patients(root, *lines)
    with pytest.raises(ValueError) as refused:
        scans.find_scans(None)
    start, _, end = f"raw/patients.csv {sentence}".partition(".*")
    assert str(refused.value).startswith(start) and str(refused.value).endswith(end or "")


def moved(mm):
    """Return the affine of hand-made scans, moved along their columns."""
    affine = LPS.copy()
    affine[0, 3] = mm
    return affine


APART = "a{1}_orig.nii and its mask a{1}_liver.nii have affines that put one voxel"
GRIDS = {  # shape and affine of a mask, what is said, None if nothing
    "the same": ((32, 32, 6), LPS, None),
    "rounded": ((32, 32, 6), np.diag([-1.0001, -1, 2, 1]), None),
    "one slice fewer": (
        (32, 32, 5),
        LPS,
        "a{1}_orig.nii is 32 x 32 x 6 but its mask a{1}_liver.nii is 32 x 32 x 5: export",
    ),
    "thicker slices": ((32, 32, 6), np.diag([-1, -1, 2.5, 1]), f"{APART} 2.5 mm apart"),
    "mirrored": ((32, 32, 6), np.diag([1, -1, 2, 1]), f"{APART} 62 mm apart"),
    "half a voxel apart": ((32, 32, 6), moved(0.5), f"{APART} 0.5 mm apart"),
    "2-D": ((32, 32), LPS, "a{1}_liver.nii has the shape 32 x 32, wanted one 3-D volume"),
}


@pytest.mark.parametrize("case", GRIDS)
def test_a_mask_on_another_grid_than_its_image_is_refused(root, case):
    shape, affine, sentence = GRIDS[case]
    image = save(root / "raw/train/a{1}_orig.nii", body_and_liver()[0])
    mask = save(root / "raw/train/a{1}_liver.nii", np.zeros(shape, np.uint8), affine)
    files = scans.Files("a{1}", "a{1}", image, mask)
    if sentence is None:
        assert scans.check(files, "train", False) == []
        return
    with pytest.raises(ValueError) as refused:
        scans.check(files, "train", False)
    assert str(refused.value).startswith(f"raw/train/{sentence}")
    if "mm apart" in sentence:
        assert "--mask-on-image-grid" in str(refused.value)
        (odd,) = scans.check(files, "train", True)
        assert odd.startswith("the mask's affine, ") and odd.endswith(" mm off, is set aside")


def header(affine=LPS, sform=1, qform=1, qform_affine=None, zooms=None):
    image = nib.Nifti1Image(body_and_liver()[0], None)
    image.set_qform(affine if qform_affine is None else qform_affine, qform)
    image.set_sform(affine, sform)
    if zooms:
        image.header.set_zooms(zooms)
    return image


UNPLACED = np.diag([-1.0, -1.0, 1.0, 1.0])
ODD_HEADERS = {
    "hand-made": (header(), []),
    "oblique": (header(OBLIQUE), []),
    "sform alone": (header(sform=2, qform=0), []),
    "qform alone": (header(sform=0), []),
    "1 mm a voxel somewhere": (
        header(np.array([[-1, 0, 0, 9], [0, -1, 0, 9], [0, 0, 1, 9], [0, 0, 0, 1]])),
        [],
    ),
    "identity": (header(np.eye(4)), ["its header gives 1 x 1 x 1 mm and no orientation, as LiTS"]),
    "identity of other readers": (header(UNPLACED), ["its header gives 1 x 1 x 1 mm and no ori"]),
    "no codes": (header(sform=0, qform=0), ["its header does not say how it lies"]),
    "nothing": (
        nib.Nifti1Image(body_and_liver()[0], None),
        ["its header does not say how it lies", "its header gives 1 x 1 x 1 mm and no orient"],
    ),
    "moved by 7 mm": (
        header(qform_affine=moved(7)),
        ["its sform and qform put a voxel 7 mm apart, the sform is taken"],
    ),
    "mirrored": (
        header(qform_affine=np.diag([1.0, -1, 2, 1])),  # 31 columns to either side
        ["its sform and qform put a voxel 62 mm apart, the sform is taken"],
    ),
    "rounded": (header(qform_affine=moved(0.05)), []),
    "in metres": (
        header(np.diag([-0.001, -0.001, 0.002, 1])),
        ["its slices are 0.032 mm wide, wanted 20 to 2000"],
    ),
    "pixels of a slice that are not square": (
        header(np.diag([-1.0, -2.0, 2.0, 1.0])),
        ["its axial slices have pixels of 1 x 2 mm, as if its axes were in another order"],
    ),
    "askew": (
        header(np.array([[-1, 0, 0, 0], [0, -0.8, -1.2, 0], [0, -0.6, 1.6, 0], [0, 0, 0, 1]])),
        ["it lies 37 degrees askew, so that no slice is axial"],  # its tangent is 3 / 4
    ),
    "other sizes": (
        header(qform=0, zooms=(0.7, 0.7, 5)),
        ["its header gives voxels of 0.7 x 0.7 x 5 mm and its sform of 1 x 1 x 2, the sform is"],
    ),
}


@pytest.mark.parametrize("case", ODD_HEADERS)
def test_a_header_that_may_mislead_is_said(root, case):
    image, sentences = ODD_HEADERS[case]
    nib.save(image, root / "a.nii")
    odd = scans.odd_header(volumes.open_volume(root / "a.nii"))
    assert len(odd) == len(sentences)
    assert all(said.startswith(wanted) for said, wanted in zip(odd, sentences, strict=True))


def test_a_qform_that_is_none_does_not_matter_beside_an_sform(root):
    image = header()
    image.header["quatern_b"] = image.header["quatern_c"] = 1
    nib.save(image, root / "a.nii")
    assert scans.odd_header(volumes.open_volume(root / "a.nii")) == []


def measured(root, image, mask, affine=LPS, axes="LPS", odd=()):
    """Return what is measured of an image and a mask on the axes (L, P, S)."""
    paths = save(root / "a_orig.nii", image, affine, axes), None
    liver = None
    if mask is not None:
        paths = paths[0], save(root / "a_liver.nii", mask, affine, axes)
        liver = volumes.read_liver(paths[1])
    files = scans.Files("a", "A", *paths)
    return scans.measure(files, volumes.read_image(paths[0]), liver, [*odd])


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SRP", "ILA"])
def test_a_scan_is_measured_on_any_axes(root, axes):
    image, liver = body_and_liver()
    image[4:14, 6:16, 2] = 90  # of three slices of liver
    large = np.diag([-10.0, -10.0, 20.0, 1.0])
    row = measured(root, image, liver, large, axes, ["its header"])
    sizes = {"S": 20}
    spacing = " x ".join(str(sizes.get(axis.replace("I", "S"), 10)) for axis in axes)
    voxels = " x ".join({20: "6"}.get(int(mm), "32") for mm in spacing.split(" x "))
    assert row["voxels"] == voxels and row["spacing_mm"] == spacing and row["axes"] == axes
    assert (row["scan"], row["patient"], row["labels"]) == ("a", "A", "0 1")
    assert (row["liver_ml"], row["liver_hu"], row["side"]) == (600, 100, "right")
    assert row["odd"] == ["its header"]  # 300 voxels of 2 ml are a liver


def test_a_scan_without_mask_is_measured_too(root):
    row = measured(root, body_and_liver()[0], None)
    assert (row["labels"], row["odd"]) == ("", []) and "liver_ml" not in row


def test_a_body_that_is_not_in_hu_is_said_without_a_mask(root):
    (odd,) = measured(root, body_and_liver()[0] + 200, None)["odd"]  # soft tissue of 40 HU
    assert odd == "a body of 240 HU, wanted at most 180, as if it were not in HU"


def test_a_header_in_centimetres_is_said(root):
    path = save(root / "a_orig.nii", np.zeros((512, 512, 2), np.int16), np.diag([0.07] * 3 + [1]))
    (odd,) = scans.odd_header(nib.load(path))  # slices are 36 mm wide, as those of a toe may be
    assert odd == "its pixels are 0.07 mm wide, wanted 0.2 or more, as if its header were not in mm"


ODD_LIVERS = {
    "small": (LPS, lambda image, liver: None, ["a liver of 0.6 ml, wanted 200 to 4000"]),
    "large": (
        np.diag([-20.0, -20.0, 40.0, 1.0]),
        lambda image, liver: None,
        ["a liver of 4800 ml, wanted 200 to 4000"],
    ),
    "none": (
        LPS,
        lambda image, liver: liver.fill(0),
        ["no liver in its mask of labels 0, so all of its slices count as none"],
    ),
    "fat": (
        np.diag([-10.0, -10.0, 20.0, 1.0]),
        lambda image, liver: image.__setitem__(liver == 1, -20),
        ["a liver of -20 HU, wanted 0 to 250"],
    ),
    "of another scan": (
        np.diag([-10.0, -10.0, 20.0, 1.0]),
        lambda image, liver: image.__setitem__(np.s_[4:14, 6:7, 2:5], -500),  # 30 of 300 voxels
        ["10% of its liver are air or fat, as if the mask were not this scan's or lay on other a"],
    ),
    "in every third slice": (
        np.diag([-10.0, -10.0, 20.0, 1.0]),
        lambda image, liver: (liver.__setitem__(np.s_[..., 3:], 0), liver[6:12, 6:16, 5].fill(1)),
        ["2 slices without liver between those with it, as if not all were marked"],
    ),
    "mirrored": (
        np.diag([10.0, -10.0, 20.0, 1.0]),
        lambda image, liver: None,
        ["a liver on the patient's left, as if the scan were mirrored"],
    ),
}


@pytest.mark.parametrize("case", ODD_LIVERS)
def test_a_liver_that_can_hardly_be_is_said(root, case):
    affine, change, odd = ODD_LIVERS[case]
    image, liver = body_and_liver()
    change(image, liver)
    found = measured(root, image, liver, affine)["odd"]
    assert [said[: len(wanted)] for said, wanted in zip(found, odd, strict=True)] == odd


def test_a_liver_in_the_middle_is_on_no_side(root):
    image, liver = body_and_liver()
    liver[:] = 0
    liver[11:21, 6:16] = 1  # columns 11 to 20 of a body from 2 to 29
    row = measured(root, image, liver, np.diag([-10.0, -10.0, 10.0, 1.0]))
    assert (row["side"], row["odd"]) == ("", [])


def test_voxels_without_a_number_are_said(root):
    image, liver = body_and_liver()
    image, liver = image.astype(np.float32), liver.astype(np.float32)
    image[0, :3, 0], liver[0, 0, :2] = np.nan, np.nan
    row = measured(root, image, liver, np.diag([-10.0, -10.0, 20.0, 1.0]))
    assert row["odd"] == [
        "3 voxels hold no number, they are air now",
        "2 voxels of its mask hold no number, they are background now",
    ]


def thick(slices=24):
    """Return the hand-made CT in many slices, no two of them alike."""
    image = body_and_liver((32, 32, slices))[0]
    image[5, 25] = np.arange(slices)  # HU
    return image


def row_of(root, image, name="a", patient=None, **options):
    row = measured(root, image, None, **options)
    return row | {"scan": name, "patient": patient or name}


COPIES = {
    "the same": lambda image: {"image": image},
    "on other axes": lambda image: {"image": image, "axes": "SRA"},
    "with another header": lambda image: {"image": image, "affine": np.eye(4)},
    "mirrored": lambda image: {"image": image[::-1]},
    "as fractions": lambda image: {"image": image + np.float32(0.02)},
    "padded": lambda image: {"image": np.where(image < -900, -1024, image)},
    "clipped": lambda image: {"image": image.clip(-160, 240)},
    "less five slices": lambda image: {"image": image[..., 2:-3]},
    "every third slice": lambda image: {"image": image[..., ::3]},
    "a half of it": lambda image: {"image": image[..., 6:18]},
    "less the air around it": lambda image: {"image": image[1:-1, 2:-2]},
}


@pytest.mark.parametrize("case", COPIES)
def test_one_scan_in_both_splits_is_found_whatever_its_name_and_axes(root, case):
    one = row_of(root, thick(), "x1")
    other = row_of(root, name="x2", **COPIES[case](thick()))
    (fault,) = scans.find_copies({"train": [one], "test": [other]})
    assert fault.startswith("raw/test holds with x2 the voxels of x1 in raw/train, and a test on")


def test_scans_that_share_a_slice_by_chance_are_two(root):
    image = thick()
    image[..., -3:] = 0  # filled up with blank slices
    one = row_of(root, image, "x1")
    image[9, 9, 1:-3] += 1
    other = row_of(root, image, "x2")
    assert scans.find_copies({"train": [one], "test": [other]}) == []
    assert one["odd"] == other["odd"] == []


def test_one_scan_twice_in_a_split_is_said_unless_it_is_known_to_be_one_patient(root):
    rows = [
        row_of(root, body_and_liver()[0], name, patient) for name, patient in ("aA", "bB", "cA")
    ]
    assert scans.find_copies({"train": rows, "test": []}) == []
    assert [len(row["odd"]) for row in rows] == [0, 1, 0]
    assert rows[1]["odd"][0].startswith("the voxels of a under another name, give both one pat")


@pytest.mark.parametrize(("free", "most", "fitting"), [(9e9, 8, 8), (9e5, 8, 3), (1, 8, 1)])
def test_no_more_scans_are_sliced_at_a_time_than_the_memory_holds(
    root, monkeypatch, capsys, free, most, fitting
):
    image = save(root / "a_orig.nii", np.zeros((100, 100, 4), np.int16))
    mask = save(root / "a_liver.nii", np.zeros((100, 100, 4), np.uint8))
    monkeypatch.setattr(scans, "free_memory", lambda: int(free))
    files = scans.Files("a", "a", image, mask)  # 40,000 voxels of 2 x 2 + 3 bytes
    assert scans.fitting_workers([files], 3, most) == fitting
    assert bool(capsys.readouterr().out) == (fitting < most)


def test_what_was_measured_is_read_back_of_scans_that_are_still_there(root):
    rows = [row_of(root, body_and_liver()[0], name) for name in ("a", "b")]
    scans.write_table(root / "scans_train.csv", rows)
    (row,) = scans.read_table(root / "scans_train.csv", [scans.Files("b", "b")])
    assert (row["scan"], row["values"]) == ("b", rows[1]["values"])
    assert scans.read_table(root / "scans_test.csv", [scans.Files("b", "b")]) == []
    (root / "scans_train.csv").write_text("scan,ml\nb,3\n")
    assert scans.read_table(root / "scans_train.csv", [scans.Files("b", "b")]) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_name_that_is_no_text_is_written_and_read_back(root):
    name = os.fsdecode(b"M\xfcller")
    scans.write_table(root / "scans_test.csv", [row_of(root, body_and_liver()[0], name)])
    assert scans.read_table(root / "scans_test.csv", [scans.Files(name, name)])[0]["scan"] == name
