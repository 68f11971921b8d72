"""raw/dicom.py on hand-made DICOM files of a few pixels."""

import errno
import io
import shutil
import subprocess
import sys

import gdcm
import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import REPO, SHARED_SCANS, body_and_liver
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage, generate_uid
from test_ircad import dicom as dicom_file
from test_ircad import put, stack

import data

pytest.importorskip("highdicom")  # there is none for Linux on ARM
sys.path.insert(0, str(REPO / "raw"))
import dicom  # noqa: E402  raw/ has to be on the path first
import segmentation  # noqa: E402
import volumes  # noqa: E402

STUDY = {"StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4", "StudyDate": "20200101"}
TILTED = {"orientation": (1, 0, 0, 0, 0.8, 0.6), "step": (0, -1.2, 1.6)}  # cosine 0.8, sine 0.6
PATIENT = {
    "PatientName": "Mueller^Gerda",
    "PatientID": "K4711-Q0815",
    "PatientBirthDate": "19500203",
    "AccessionNumber": "A998877",
    "InstitutionName": "Sankt Vincenz",
    "ReferringPhysicianName": "Brinkmann",
    "StudyTime": "112233.445566",
}
SYNTAXES = [
    "ImplicitVRLittleEndian",
    "DeflatedExplicitVRLittleEndian",
    "RLELossless",
    "JPEGLosslessProcess14",
    "JPEGLosslessProcess14_1",
    "JPEG2000Lossless",
    "JPEGLSLossless",
]


@pytest.fixture
def raw(root, monkeypatch):
    """Return an empty raw/ for script and data.py."""
    for module in (dicom, segmentation, volumes):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(dicom.signal, "signal", lambda *_: None)
    monkeypatch.setattr(dicom.warnings, "simplefilter", lambda *_: None)
    (root / "preds").mkdir()
    return root / "raw"


def series(volume, prefix="a", **fields):
    """Return {"a/image_0": bytes, ...} of a volume (columns, rows, slices), a series of its own."""
    fields = {"SeriesInstanceUID": generate_uid(), "SeriesNumber": 1, **STUDY, **fields}
    return {f"{prefix}/{name}": file for name, file in stack(volume, **fields).items()}


def ct():
    """Return the hand-made CT of conftest, whose every slice is another."""
    image, _ = body_and_liver()
    return image + np.arange(6, dtype=np.int16)


def change(file, **fields):
    """Return a DICOM file with other header fields."""
    header = pydicom.dcmread(io.BytesIO(file))
    for keyword, value in fields.items():
        if isinstance(value, DataElement):
            header.add(value)
        else:
            setattr(header, keyword, value)
    out = io.BytesIO()
    header.save_as(out)
    return out.getvalue()


def compress(folder, syntax):
    """Store the files of a folder in another transfer syntax, in place."""
    for path in folder.rglob("image_*"):
        reader, writer = gdcm.ImageReader(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        assert reader.Read()
        changer = gdcm.ImageChangeTransferSyntax()
        changer.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        changer.SetInput(reader.GetImage())
        assert changer.Change()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(changer.GetOutput())
        assert writer.Write()


def run(*options):
    """Run the script and return its exit code; 0 if it does not say any."""
    try:
        dicom.main([str(option) for option in options])
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    return 0


def names(raw):
    return sorted(path.name for path in (raw / "test").iterdir())


def stored(raw, name="scan"):
    """Return what was written, on the axes (L, P, S) of the slices: (columns, rows, slices)."""
    image = nib.load(raw / "test" / f"{name}_orig.nii.gz")
    assert image.get_data_dtype() == np.int16
    assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
    return np.asarray(image.dataobj)[:, ::-1]


def test_a_series_in_any_nesting_becomes_a_scan_that_data_py_slices(raw, tmp_path, capsys):
    files = series(ct(), "CD/DICOM/1/2") | {"CD/DICOMDIR": b"x", "CD/AUTORUN.INF": b"no"}
    assert run(put(tmp_path / "scan", files)) == 0
    assert names(raw) == ["scan_orig.nii.gz"]
    np.testing.assert_array_equal(stored(raw), ct())
    said = capsys.readouterr().out
    assert "not read (InvalidDicomError): 1" in said
    assert "raw/test/scan_orig.nii.gz is written" in said
    data.main(["--size", "32", "--only", "test"])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_transfer_syntax_gives_the_same_voxels(raw, tmp_path, syntax, signed):
    twelve = {"RescaleIntercept": -1024, "BitsStored": 12, "HighBit": 11}
    volume = ct() if signed else (ct() + 1024).astype(np.uint16)
    folder = put(tmp_path / "scan", series(volume, **({} if signed else twelve)))
    compress(folder, syntax)
    assert run(folder) == 0
    np.testing.assert_array_equal(stored(raw), ct())


def test_a_syntax_that_is_not_read_is_said_before_anything_is_decoded(raw, tmp_path, capsys):
    folder = put(tmp_path / "scan", series(ct()))
    for path in folder.rglob("image_*"):
        header = pydicom.dcmread(path)
        header.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
        header.PixelData = pydicom.encaps.encapsulate([b"1234"])
        header.save_as(path)
    assert run(folder) == 1
    assert "export it uncompressed" in capsys.readouterr().out


def multiframe(volume, times=1, **fields):
    """Return an enhanced CT file of a volume (columns, rows, slices), its frames from the head."""
    first = np.ascontiguousarray(volume[:, :, 0].T)
    header = pydicom.dcmread(io.BytesIO(dicom_file(first, (0, 0, 0), 1, **STUDY, **fields)))
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        del header[keyword]
    del header.RescaleSlope, header.RescaleIntercept
    header.NumberOfFrames = volume.shape[2] * times
    shared, frames, pixels = Dataset(), [], []
    shared.PlaneOrientationSequence = Sequence([Dataset()])
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence = Sequence([Dataset()])
    shared.PixelMeasuresSequence[0].PixelSpacing = [1, 1]
    shared.PixelMeasuresSequence[0].SliceThickness = 2
    for time in range(times):
        for k in reversed(range(volume.shape[2])):
            frame = Dataset()
            frame.PlanePositionSequence = Sequence([Dataset()])
            frame.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 2 * k]
            frame.PixelValueTransformationSequence = Sequence([Dataset()])
            frame.PixelValueTransformationSequence[0].RescaleSlope = 1
            frame.PixelValueTransformationSequence[0].RescaleIntercept = time
            frame.FrameContentSequence = Sequence([Dataset()])
            frame.FrameContentSequence[0].TemporalPositionIndex = time + 1
            frame.FrameContentSequence[0].FrameAcquisitionNumber = 1
            frames.append(frame)
            pixels.append(volume[:, :, k].T.tobytes())
    header.SharedFunctionalGroupsSequence = Sequence([shared])
    header.PerFrameFunctionalGroupsSequence = Sequence(frames)
    header.PixelData = b"".join(pixels)
    out = io.BytesIO()
    header.save_as(out)
    return out.getvalue()


@pytest.mark.parametrize("syntax", [None, "JPEGLosslessProcess14_1", "JPEG2000Lossless"])
def test_an_enhanced_file_of_many_frames_is_a_series(raw, tmp_path, syntax):
    folder = put(tmp_path / "scan", {"image_0": multiframe(ct())})
    if syntax:
        compress(folder, syntax)
    assert run(folder) == 0
    np.testing.assert_array_equal(stored(raw), ct())


def test_two_time_points_in_an_enhanced_file_are_two_series(raw, tmp_path):
    assert run(put(tmp_path / "scan", {"a": multiframe(ct(), times=2)}), "--all") == 0
    np.testing.assert_array_equal(stored(raw, "scan_1"), ct())
    np.testing.assert_array_equal(stored(raw, "scan_2"), ct() + 1)


SCOUT = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "orientation": (1, 0, 0, 0, 0, -1)}


def test_the_table_lists_what_is_there_and_says_what_is_passed_over(raw, tmp_path, capsys):
    small = ct()[:, :, :3]
    dose = {"Modality": "SR", "ImagePositionPatient": None, "PixelSpacing": None}
    files = {
        **series(small[:, :, :1], "s", SeriesNumber=1, SeriesDescription="Topogram", **SCOUT),
        **series(small, "t", SeriesNumber=2, ConvolutionKernel=["B31f", "2"]),
        **series(ct(), "l", SeriesNumber=3, SeriesDescription="Lunge", ConvolutionKernel="B70f"),
        **series(ct()[:, :, :4], "p", SeriesNumber=4, SeriesDescription="portal venous"),
        **series(small[:, :, :1], "d", SeriesNumber=501, SeriesDescription="Dose", **dose),
        **series(small, "b", SeriesNumber=9, step=(0, 0, 0), SeriesDescription="PreMonitoring"),
    }
    assert run(put(tmp_path / "scan", files)) == 0
    np.testing.assert_array_equal(stored(raw), ct()[:, :, :4])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:12] == [
        "series study description slices spacing_mm kernel size",
        "1 1 Topogram 1 - - 32 x 32",
        "2 1 - 3 1.0 x 1.0 x 2.0 B31f 2 32 x 32",
        "3 1 Lunge 6 1.0 x 1.0 x 2.0 B70f 32 x 32",
        "4 1 portal venous 4 1.0 x 1.0 x 2.0 - 32 x 32",
        "5 1 PreMonitoring 3 - - 32 x 32",
        "6 1 Dose 1 - - 32 x 32",
        "series 1 is passed over: a scout",
        "series 5 is passed over: at one position, a single slice or the timing of contrast medium",
        "series 6 is passed over: SR, not CT",
        "series 4 is taken, --series N takes another",
        "raw/test/scan_orig.nii.gz is written",
    ]


def test_another_series_and_all_of_them_can_be_asked_for(raw, tmp_path, capsys):
    files = series(ct(), "a") | series(ct()[:, :, :3], "b", SeriesNumber=2)
    files |= series(ct()[:, :, :1], "c", SeriesNumber=3, **SCOUT)
    folder = put(tmp_path / "scan", files)
    assert run(folder, "--series", 2, "--name", "venous phase") == 0
    np.testing.assert_array_equal(stored(raw, "venous_phase"), ct()[:, :, :3])
    assert run(folder, "--all") == 0
    assert names(raw) == [f"{n}_orig.nii.gz" for n in ("scan_1", "scan_2", "venous_phase")]
    for number in (3, 9):
        assert run(folder, "--series", number) == 1
        assert f"--series {number} cannot be taken, wanted one of [1, 2]" in capsys.readouterr().err


def test_two_studies_in_one_folder_are_told_apart_without_a_date(raw, tmp_path, capsys):
    later = {"StudyInstanceUID": "1.2.9", "StudyDate": "20210506", "SeriesNumber": 1}
    files = series(ct()[:, :, :4], "a", **later) | series(ct(), "b", SeriesNumber=7)
    assert run(put(tmp_path / "scan", files)) == 0
    said = capsys.readouterr().out
    rows = [line.split()[:4] for line in said.splitlines()[1:3]]
    assert rows == [["1", "1", "-", "6"], ["2", "2", "-", "4"]]
    assert "2020" not in said and "2021" not in said


TIMES = {
    "acquisition numbers": [{"AcquisitionNumber": n} for n in (1, 2)],
    "acquisition times": [{"AcquisitionTime": f"10{n}000"} for n in (1, 2)],
    "nothing but the order": [{}, {}],
}


@pytest.mark.parametrize("told_by", TIMES)
def test_two_time_points_in_one_series_are_two_rows(raw, tmp_path, told_by):
    uid, files = generate_uid(), {}
    for time, fields in enumerate(TIMES[told_by]):
        phase = series(ct() + np.int16(50 * time), f"t{time}", SeriesInstanceUID=uid, **fields)
        files |= {
            path: change(file, InstanceNumber=10 * time + k)
            for k, (path, file) in enumerate(phase.items())
        }
    assert run(put(tmp_path / "scan", files), "--all") == 0
    np.testing.assert_array_equal(stored(raw, "scan_1"), ct())
    np.testing.assert_array_equal(stored(raw, "scan_2"), ct() + 50)


def test_time_points_that_lie_between_each_other_are_not_mixed(raw, tmp_path):
    uid = generate_uid()
    first = series(ct(), "a", SeriesInstanceUID=uid, AcquisitionNumber=1)
    second = series(ct() + 50, "b", SeriesInstanceUID=uid, AcquisitionNumber=2, first=(0, 0, 1))
    assert run(put(tmp_path / "scan", first | second), "--all") == 0
    np.testing.assert_array_equal(stored(raw, "scan_2"), ct() + 50)


def test_slices_with_an_acquisition_each_are_one_series(raw, tmp_path):
    files = {
        path: change(file, AcquisitionNumber=k, AcquisitionTime=f"1000{k:02d}")
        for k, (path, file) in enumerate(series(ct()).items())
    }
    assert run(put(tmp_path / "scan", files)) == 0
    np.testing.assert_array_equal(stored(raw), ct())


def test_slices_that_are_there_twice_are_taken_once_and_that_is_said(raw, tmp_path, capsys):
    files = series(ct())
    copies = {f"again/{path}": file for path, file in files.items()}
    renamed = change(files["a/image_2"], SOPInstanceUID=generate_uid(), InstanceNumber=77)
    assert run(put(tmp_path / "scan", files | copies | {"a/sent_again": renamed})) == 0
    np.testing.assert_array_equal(stored(raw), ct())
    said = capsys.readouterr().out
    assert "there twice and taken once: 6" in said
    assert "there twice under two names and taken once: 1" in said


def test_one_uid_for_all_files_does_not_make_them_copies(raw, tmp_path):
    files = {path: change(file, SOPInstanceUID="1.2.5") for path, file in series(ct()).items()}
    assert run(put(tmp_path / "scan", files)) == 0
    np.testing.assert_array_equal(stored(raw), ct())


@pytest.mark.filterwarnings("ignore:Invalid value for VR IS")
def test_a_number_with_a_letter_in_it_costs_no_slice(raw, tmp_path):
    files = series(ct())
    files["a/image_2"] = files["a/image_2"].replace(b"IS\x02\x002 ", b"IS\x02\x002A")
    assert b"2A" in files["a/image_2"]
    assert run(put(tmp_path / "scan", files)) == 0
    np.testing.assert_array_equal(stored(raw), ct())


def test_a_segmentation_that_lies_beside_its_series_is_passed_over(raw, tmp_path, capsys):
    folder = put(tmp_path / "scan", series(ct()))
    assert run(folder, "--mask", save_mask(tmp_path, marked())) == 0
    (tmp_path / "preds" / "scan_liver.dcm").rename(folder / "scan_liver.dcm")
    assert run(folder) == 0
    assert "SEG, not CT" in capsys.readouterr().out
    np.testing.assert_array_equal(stored(raw), ct())


def without_a_slice(files):
    del files["a/image_3"]


def with_another_slice_there(files):
    other = change(files["a/image_4"], ImagePositionPatient=[0, 0, 6], InstanceNumber=9)
    files["a/more"] = change(other, SOPInstanceUID=generate_uid())


def moved_aside(files):
    for k in (1, 2, 3):
        files[f"a/image_{k}"] = change(files[f"a/image_{k}"], ImagePositionPatient=[3, 0, 2 * k])


def cut_off(files):
    files["a/image_3"] = files["a/image_3"][:-9]


def of_iodine(files):
    for path, file in files.items():
        files[path] = change(file, RescaleType="MGML")


BROKEN = {
    without_a_slice: "image 2 and image 4 lie 4 mm apart and other neighbours 2 mm",
    with_another_slice_there: "lie 0 mm apart and other neighbours 2 mm",
    moved_aside: "lies 3 mm aside of the line from the first slice to the last",
    cut_off: "image 3 cannot be read as a whole file",
    of_iodine: "in MGML, not HU",
}


@pytest.mark.parametrize("breaking", BROKEN)
def test_what_is_no_whole_ct_is_refused_in_one_sentence(raw, tmp_path, capsys, breaking):
    files = series(ct())
    breaking(files)
    assert run(put(tmp_path / "scan", files)) == 1
    said = capsys.readouterr()
    assert BROKEN[breaking] in said.out + said.err
    assert len([line for line in said.err.splitlines() if "raw/dicom.py:" in line]) == 1
    assert names(raw) == []


def test_padding_becomes_air(raw, tmp_path):
    image = ct()
    image[:3], image[3:5] = -2000, -1990
    fields = {"RescaleIntercept": -10, "PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1990}
    assert run(put(tmp_path / "scan", series(image, **fields))) == 0
    found = stored(raw)
    assert set(found[:5].ravel().tolist()) == {-1024}
    np.testing.assert_array_equal(found[5:], ct()[5:] - 10)


@pytest.mark.parametrize("intercept", [-1024, 0])
def test_padding_that_was_written_without_its_sign_is_found(raw, tmp_path, intercept):
    image = ct()
    image[:3] = -2000
    files = series(image - np.int16(intercept), RescaleIntercept=intercept)
    padding = DataElement("PixelPaddingValue", "US", 2**16 - 2000 - intercept)
    files = {path: change(file, PixelPaddingValue=padding) for path, file in files.items()}
    assert run(put(tmp_path / "scan", files)) == 0
    assert set(stored(raw)[:3].ravel().tolist()) == {-1024}


@pytest.mark.parametrize("inverted", [False, True])
def test_monochrome1_changes_no_value_unless_air_is_the_highest(raw, tmp_path, capsys, inverted):
    values = (ct() + 1024).astype(np.uint16)  # 12 bits
    values = 4095 - values if inverted else values
    fields = {"BitsStored": 12, "HighBit": 11, "RescaleIntercept": -1024}
    fields["PhotometricInterpretation"] = "MONOCHROME1"
    assert run(put(tmp_path / "scan", series(values, **fields))) == 0
    np.testing.assert_array_equal(stored(raw), ct())
    assert ("turned round" in capsys.readouterr().out) == inverted


@pytest.mark.parametrize("sign", [1, -1])
def test_a_leaning_gantry_is_moved_onto_a_straight_grid(raw, tmp_path, capsys, sign):
    """Slices across the patient 2 mm apart, each 1 mm further to the front than the one below."""
    fields = {"orientation": (1, 0, 0, 0, 1, 0), "step": (0, -sign, 2)}
    assert run(put(tmp_path / "scan", series(ct(), **fields))) == 0
    said = capsys.readouterr().out
    assert "the gantry leaned" in said and "1.0 x 1.0 x 2.0" in said
    found, affine = stored(raw), nib.load(raw / "test" / "scan_orig.nii.gz").affine
    assert found.shape == (32, 37, 6)  # five rows more
    for k in range(6):
        start = 5 - k if sign > 0 else k
        np.testing.assert_array_equal(found[:, start : start + 32, k], ct()[:, :, k])
        assert set(np.delete(found[:, :, k], range(start, start + 32), axis=1).ravel()) == {-1024}
    np.testing.assert_allclose(affine[:3, :3], np.diag([-1, 1, 2]), atol=1e-6)
    # the last row of the first slice lies 31 mm to the back, and 36 rows are counted from there
    assert affine[1, 3] == (-31 if sign > 0 else -36)


GEOMETRIES = {
    "axial": {},
    "reversed": {"step": (0, 0, -2)},
    "oblique": TILTED,
    "prone": {"orientation": (-1, 0, 0, 0, -1, 0), "first": (10, 20, 5)},
    "coronal": {"orientation": (1, 0, 0, 0, 0, -1), "step": (0, 2, 0)},
    "leaning": {"step": (0, -0.7, 2)},
    "other spacing": {"spacing": (0.5, 0.75), "step": (0, 0, 1.25)},
}


def marked():
    """Return a mask (columns, rows, slices) without any symmetry; the last slice is empty."""
    _, liver = body_and_liver()
    liver[5:9, 7, 1] = liver[0, 0, 0] = liver[31, 31, 3] = 1
    return liver


def read_back(path, folder):
    """Return {file: mask (rows, columns)} of a segmentation by the positions in its own header."""
    found = pydicom.dcmread(path)
    at = {}
    for frame, pixels in zip(
        found.PerFrameFunctionalGroupsSequence, found.pixel_array, strict=True
    ):
        place = frame.PlanePositionSequence[0].ImagePositionPatient
        at[tuple(np.round(np.array(place, float), 3))] = pixels
    masks = {}
    for file in sorted(folder.rglob("image_*")):
        header = pydicom.dcmread(file)
        place = tuple(np.round(np.array(header.ImagePositionPatient, float), 3))
        masks[file.name] = at.pop(place, np.zeros((header.Rows, header.Columns)))
    assert not at
    return masks


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_mask_comes_back_on_the_slices_it_was_made_from(raw, tmp_path, geometry):
    """The mask takes the way of the scan, as if it were one of 0 and 700 HU with fat around."""
    fields = {"SeriesInstanceUID": generate_uid(), **GEOMETRIES[geometry]}
    as_scan = np.where(marked(), 700, -500).astype(np.int16)
    folder = put(tmp_path / "scan", series(as_scan, **fields))
    assert run(folder) == 0
    image = nib.load(raw / "test" / "scan_orig.nii.gz")
    mask = (np.asarray(image.dataobj) > 100).astype(np.uint8)
    path = tmp_path / "preds" / "scan_liver.nii.gz"
    nib.save(nib.Nifti1Image(mask, image.affine), path)
    assert run(folder, "--mask", path) == 0
    for k in range(6):
        found = read_back(tmp_path / "preds" / "scan_liver.dcm", folder)[f"image_{k}"]
        np.testing.assert_array_equal(found, marked()[:, :, k].T)


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SRP"])
def test_a_mask_on_other_axes_of_the_same_grid_fits(raw, tmp_path, axes):
    folder = put(tmp_path / "scan", series(ct(), **TILTED))
    slices = dicom.find_series(folder)[0].slices
    path = tmp_path / "preds" / "scan_liver.nii.gz"
    nib.save(volumes.as_nifti(marked(), dicom.make_affine(slices), axes), path)
    assert run(folder, "--mask", path) == 0
    found = read_back(tmp_path / "preds" / "scan_liver.dcm", folder)
    np.testing.assert_array_equal([*found.values()], marked().transpose(2, 1, 0))


def save_mask(tmp_path, volume, affine=None):
    affine = np.diag([-1, -1, 2, 1]) if affine is None else affine
    path = tmp_path / "preds" / "scan_liver.nii.gz"
    nib.save(nib.Nifti1Image(volume, affine), path)
    return path


def test_the_segmentation_is_of_liver_and_leads_to_its_series(raw, tmp_path):
    files = series(ct(), **PATIENT)
    folder = put(tmp_path / "scan", files)
    assert run(folder, "--mask", save_mask(tmp_path, marked())) == 0
    found = pydicom.dcmread(tmp_path / "preds" / "scan_liver.dcm")
    source = pydicom.dcmread(io.BytesIO(files["a/image_0"]))
    (segment,) = found.SegmentSequence
    assert found.Modality == "SEG" and found.SegmentationType == "BINARY"
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"  # SNOMED's liver
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "SCT"
    assert segment.SegmentAlgorithmName == "Liver segmentation in CT with a U-net in Keras"
    assert found.StudyInstanceUID == source.StudyInstanceUID
    assert found.FrameOfReferenceUID == source.FrameOfReferenceUID
    (referenced,) = found.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == source.SeriesInstanceUID
    assert len(found.PerFrameFunctionalGroupsSequence) == 5  # those with liver


def test_a_mask_of_an_enhanced_file_is_laid_over_its_frames(raw, tmp_path):
    folder = put(tmp_path / "scan", {"image_0": multiframe(ct(), times=2)})
    path = save_mask(tmp_path, marked())
    assert run(folder, "--series", 2, "--mask", path) == 0
    found = pydicom.dcmread(tmp_path / "preds" / "scan_liver.dcm")
    for frame, pixels in zip(
        found.PerFrameFunctionalGroupsSequence, found.pixel_array, strict=True
    ):
        k = int(frame.PlanePositionSequence[0].ImagePositionPatient[2] // 2)
        np.testing.assert_array_equal(pixels, marked()[:, :, k].T)
        source = frame.DerivationImageSequence[0].SourceImageSequence[0]
        assert source.ReferencedFrameNumber == 6 + 6 - k  # counted from 1, from the head
    assert len(found.PerFrameFunctionalGroupsSequence) == 5


def test_the_mask_finds_the_series_it_fits(raw, tmp_path, capsys):
    files = series(ct(), "a") | series(ct()[:, :, :4], "b", SeriesNumber=2)
    folder = put(tmp_path / "scan", files)
    assert run(folder, "--mask", save_mask(tmp_path, marked()[:, :, :4])) == 0
    said = capsys.readouterr().out
    assert "series 1 is passed over: the mask lies on another grid" in said
    assert "preds/scan_liver.dcm is written, of series 2" in said


@pytest.mark.parametrize(
    ("mask", "shift", "sentence"),
    [
        (marked(), 1, "no CT series here can be taken"),
        (marked() * 0, 0, "preds/scan_liver.nii.gz marks no liver in any slice"),
    ],
)
def test_a_mask_that_cannot_be_laid_over_is_one_sentence(
    raw, tmp_path, capsys, mask, shift, sentence
):
    affine = np.diag([-1.0, -1, 2, 1])
    affine[0, 3] = shift
    folder = put(tmp_path / "scan", series(ct()))
    assert run(folder, "--mask", save_mask(tmp_path, mask, affine)) == 1
    assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "preds").iterdir()) == ["scan_liver.nii.gz"]


def test_a_name_of_two_signs_is_hidden_where_two_letters_are_not():
    header = Dataset()
    header.PatientName, header.PatientID = "Li^An=李^安", "7"
    assert dicom.hide("abdomen 李 late, series 7", header) == "abdomen *** late, series 7"


SECRETS = ["mueller", "gerda", "k4711", "q0815", "19500203", "a998877", "vincenz", "brinkmann"]
SECRETS += ["112233.445566", "20200101"]  # a random UID holds shorter digits by chance


def test_nothing_that_tells_the_patient_is_written_or_printed(raw, tmp_path, capsys):
    told = {"SeriesDescription": "MUELLER K4711 portal", "PatientAge": "070Y"}
    files = series(ct(), "Mueller_Gerda/K4711-Q0815", **PATIENT, **told)
    files |= series(ct()[:, :, ::2], "Mueller_Gerda/b", SeriesNumber=2, **PATIENT)
    del files["Mueller_Gerda/b/image_1"]
    files["Mueller_Gerda/broken"] = files["Mueller_Gerda/b/image_2"][:300]
    folder = put(tmp_path / "scan", files)
    assert run(folder) == 0
    assert run(folder, "--mask", save_mask(tmp_path, marked())) == 0
    said = "".join(capsys.readouterr()).lower()
    assert "*** *** portal" in said
    scan = nib.load(raw / "test" / "scan_orig.nii.gz")
    content = (tmp_path / "preds" / "scan_liver.dcm").read_bytes() + scan.header.binaryblock
    for secret in SECRETS:
        assert secret not in said
        assert secret.encode() not in content.lower()


def test_a_pacs_gets_the_patient_if_it_is_asked_for(raw, tmp_path):
    folder = put(tmp_path / "scan", series(ct(), **PATIENT, SpecificCharacterSet="ISO_IR 100"))
    assert run(folder, "--mask", save_mask(tmp_path, marked()), "--identified") == 0
    found = pydicom.dcmread(tmp_path / "preds" / "scan_liver.dcm")
    assert (found.PatientName, found.PatientID) == ("Mueller^Gerda", "K4711-Q0815")
    assert (found.AccessionNumber, found.StudyDate) == ("A998877", "20200101")


@pytest.mark.parametrize("name", ["Mueller", "CT gerda 2020", "K4711"])
def test_a_folder_called_after_the_patient_asks_for_a_name(raw, tmp_path, capsys, name):
    folder = put(tmp_path / name, series(ct(), **PATIENT))
    assert run(folder) == 1
    assert capsys.readouterr().err.strip().endswith("add --name NAME")
    assert names(raw) == []
    assert run(folder, "--name", "p01") == 0
    assert names(raw) == ["p01_orig.nii.gz"]


def test_a_scan_of_the_user_is_never_overwritten(raw, tmp_path, capsys):
    folder = put(tmp_path / "scan", series(ct()))
    assert run(folder) == 0
    assert run(folder) == 0  # the same again
    (raw / "test" / "scan_orig.nii.gz").write_text("mine")
    assert run(folder) == 1
    assert "raw/test/scan_orig.nii.gz would be overwritten: take it away" in capsys.readouterr().err
    assert (raw / "test" / "scan_orig.nii.gz").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [(KeyboardInterrupt(), "interrupted"), (OSError(errno.ENOSPC, ""), "the disk is full")],
)
def test_stopped_while_writing_it_leaves_nothing(
    raw, tmp_path, capsys, monkeypatch, error, sentence
):
    def stop(_, path):
        path.write_text("half")
        raise error

    monkeypatch.setattr(dicom.nib, "save", stop)
    assert run(put(tmp_path / "scan", series(ct()))) == 1
    assert f"raw/dicom.py: {sentence}" in capsys.readouterr().err
    assert names(raw) == []


def test_importing_the_script_does_nothing(tmp_path):
    for name in ("dicom.py", "volumes.py"):
        shutil.copy(REPO / "raw" / name, tmp_path)
    command = [sys.executable, "-B", "-c", "import dicom"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dicom.py", "volumes.py"]


@pytest.mark.parametrize("files", [{}, {"a": b"not at all"}])
def test_a_folder_without_dicom_is_one_sentence(raw, tmp_path, capsys, files):
    (tmp_path / "empty").mkdir()
    assert run(put(tmp_path / "empty", files)) == 1
    assert "holds no DICOM images" in capsys.readouterr().err
    assert run(tmp_path / "nowhere") == 2


@pytest.mark.skipif(
    not (SHARED_SCANS / "test" / "ircad_e17_orig.nii.gz").exists(),
    reason="needs patient 17 in ../shared/scans, which may not be redistributed",
)
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_real_scan_comes_back_from_dicom_and_its_mask_goes_there_voxel_for_voxel(
    raw, tmp_path, syntax
):
    """The files are made from 24 slices of the NIfTI, in which the liver is."""
    paths = [SHARED_SCANS / "test" / f"ircad_e17_{kind}.nii.gz" for kind in ("orig", "liver")]
    image, liver = (nib.load(path).slicer[:, :, 60:84] for path in paths)
    assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
    wanted = np.asarray(image.dataobj)[:, ::-1]
    spacing = image.header.get_zooms()
    fields = {"spacing": (float(spacing[1]), float(spacing[0])), "step": (0, 0, float(spacing[2]))}
    folder = put(tmp_path / "scan", series(wanted, **fields, PatientName="Doe^Jane"))
    compress(folder, syntax)
    assert run(folder) == 0
    np.testing.assert_array_equal(stored(raw), wanted)
    mask = np.asarray(liver.dataobj)
    path = save_mask(tmp_path, mask, nib.load(raw / "test" / "scan_orig.nii.gz").affine)
    assert run(folder, "--mask", path) == 0
    found = read_back(tmp_path / "preds" / "scan_liver.dcm", folder)
    for k in range(24):
        np.testing.assert_array_equal(found[f"image_{k}"], mask[:, ::-1][:, :, k].T)
    assert mask.any(axis=(0, 1)).all()
