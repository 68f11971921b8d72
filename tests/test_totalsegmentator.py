"""raw/totalsegmentator.py on subjects of a few voxels, and on a server of our own."""

import hashlib
import io
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import REPO, body_and_liver

import data

sys.path.insert(0, str(REPO / "raw"))
import totalsegmentator  # noqa: E402  raw/ has to be on the path first
import volumes  # noqa: E402

AFFINE = np.diag([-1.5, -1.5, 1.5, 1])
NAMES = [f"totalseg_{{}}_{kind}.nii.gz" for kind in ("liver", "orig")]


@pytest.fixture
def raw(root, monkeypatch):
    """Return an empty raw/ for script and data.py."""
    monkeypatch.setattr(volumes, "ROOT", root)
    monkeypatch.setattr(totalsegmentator, "RAW", root / "raw")
    monkeypatch.setattr(totalsegmentator, "WORK", root / "raw" / ".totalsegmentator")
    monkeypatch.setattr(totalsegmentator.signal, "signal", lambda *_: None)
    monkeypatch.setattr("pooch.core.time.sleep", lambda _: None)
    return root / "raw"


def nifti(volume):
    """Return a volume as the bytes of a .nii.gz."""
    file = io.BytesIO(nib.Nifti1Image(volume, AFFINE).to_bytes())
    packed = io.BytesIO()
    with totalsegmentator.igzip.IGzipFile(fileobj=packed, mode="wb", mtime=0) as out:
        out.write(file.getvalue())
    return packed.getvalue()


def subject(slices=slice(2, 5), body=40):
    """Return the files of a subject whose liver is in these slices of six.

    body : HU, by which a scan differs from another
    """
    image, liver = body_and_liver()
    image[image == 40] = body
    mask = np.zeros_like(liver)
    mask[:, :, slices] = liver[:, :, 2:3]
    return {
        "ct.nii.gz": nifti(image),
        "segmentations/liver.nii.gz": nifti(mask),
        "segmentations/spleen.nii.gz": nifti(mask * 0),
    }


SUBJECTS = {  # five with a whole liver
    "s0011": subject(),
    "s0058": subject(slice(0, 3)),
    "s0064": subject(),
    "s0223": subject(slice(3, 6)),
    "s0310": subject(slice(1, 5)),
    "s0311": subject(slice(0, 0)),
    "s0440": subject(body=41),
    "s1320": subject(),
}


def zipped(subjects=SUBJECTS, folder=""):
    """Return subjects as the zip has them, with its table."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{folder}meta.csv", "image_id;age;gender\n")
        for name, files in subjects.items():
            for path, content in files.items():
                archive.writestr(f"{folder}{name}/{path}", content)
    return file.getvalue()


class Server:
    """A server on this machine that answers with these, one after the other."""

    def __init__(self, answers, monkeypatch):
        self.asked = []
        good = zipped()
        digest = hashlib.md5(good, usedforsecurity=False).hexdigest()
        monkeypatch.setattr(totalsegmentator, "MD5", digest)
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                kind = answers.pop(0)
                if isinstance(kind, int):
                    self.send_error(kind)
                    return
                body = b"other" + good[5:] if kind == "damaged" else good
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/records/1/files/"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    servers = []

    def start(*answers):
        servers.append(Server(list(answers), monkeypatch))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def run(*options):
    """Run the script and return its exit code; 0 if it does not say any."""
    try:
        totalsegmentator.main([str(option) for option in options])
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    return 0


def held(raw):
    """Return the files in raw/, below it."""
    return sorted(path.relative_to(raw).as_posix() for path in raw.rglob("*") if path.is_file())


WHOLE = {"train": ["s0011", "s0064", "s0310", "s1320"], "test": ["s0440"]}
FILES = [f"{split}/{n.format(s)}" for split, ids in WHOLE.items() for s in ids for n in NAMES]
ALL = sorted([*FILES, "totalsegmentator.csv"])


def test_whole_livers_are_downloaded_split_and_written_as_they_are(raw, serve, capsys):
    server = serve("zip")
    assert run("--url", server.url) == 0
    assert server.asked == ["/records/1/files/Totalsegmentator_dataset_small_v201.zip"]
    assert held(raw) == ALL
    for split, names in WHOLE.items():
        for name in names:
            files = SUBJECTS[name]
            contents = files["segmentations/liver.nii.gz"], files["ct.nii.gz"]
            for path, content in zip(NAMES, contents, strict=True):
                assert (raw / split / path.format(name)).read_bytes() == content
    said = capsys.readouterr().out
    assert said.count("CC BY 4.0") == said.count("J. Wasserthal et al.") == 1
    assert "stopped, the download starts again" in said
    assert said.endswith("next: python data.py\n")


def test_the_table_says_why_a_subject_is_not_taken(raw, serve):
    assert run("--url", serve("zip").url) == 0
    table = pd.read_csv(raw / "totalsegmentator.csv").set_index("subject")
    assert table["liver"].tolist() == [
        "whole",
        "cut",
        "whole",
        "cut",
        *["whole", "none"],
        *["whole"] * 2,
    ]
    assert table["split"].tolist() == ["train", "-", "train", "-", "train", "-", "test", "train"]
    # 10 x 10 x 3 voxels of 1.5^3 cubic mm are 1.01 ml
    assert table.loc["s0011"].tolist() == ["whole", "train", 6, "1.5 x 1.5 x 1.5", 1]


def test_what_was_fetched_can_be_sliced(raw, serve):
    assert run("--url", serve("zip").url) == 0
    data.main(["--size", "32"])
    imgs, masks, _ = data.load_train_data()
    assert imgs.shape == masks.shape == (4 * 6, 32, 32)


def test_a_second_run_fetches_nothing_and_one_with_a_subject_less_does(raw, serve):
    server = serve("zip", "zip")
    assert run("--url", server.url) == run("--url", server.url) == 0
    assert len(server.asked) == 1
    (raw / FILES[0]).unlink()
    assert run("--url", server.url) == 0
    assert len(server.asked) == 2
    assert held(raw) == ALL


def test_a_subject_that_was_moved_to_the_other_split_stays_there(raw, serve):
    server = serve("zip")
    assert run("--url", server.url, "--keep") == 0
    for name in NAMES:
        (raw / "train" / name.format("s0011")).rename(raw / "test" / name.format("s0011"))
    (raw / "totalsegmentator.csv").unlink()
    assert run("--url", server.url) == 0
    assert len(server.asked) == 1  # the zip was kept
    assert not (raw / "train" / NAMES[0].format("s0011")).exists()


@pytest.mark.parametrize("trouble", [503, "cut", "damaged"])
def test_trouble_that_passes_is_waited_out(raw, serve, trouble):
    server = serve(trouble, trouble, "zip")
    assert run("--url", server.url) == 0
    assert held(raw) == ALL


@pytest.mark.parametrize(
    ("trouble", "why"), [(404, "HTTPError"), ("cut", "Error"), ("damaged", "damaged")]
)
def test_a_zip_that_does_not_come_is_one_sentence_and_leaves_nothing(
    raw, serve, capsys, trouble, why
):
    assert run("--url", serve(*[trouble] * 3).url) == 1
    lines = capsys.readouterr().err.splitlines()
    (said,) = (line for line in lines if line.startswith("raw/totalsegmentator.py: http"))
    assert f"{why}): get it from https://zenodo.org" in said
    assert held(raw) == []
    assert not (raw / ".totalsegmentator").exists()


def test_interrupted_in_the_download_it_starts_again(raw, serve, monkeypatch, capsys):
    server = serve("zip", "zip")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as interruption:
        interruption.setattr("pooch.core.hash_matches", stop)
        assert run("--url", server.url) == 1
    assert "interrupted" in capsys.readouterr().err
    assert held(raw) == []
    assert run("--url", server.url) == 0
    assert held(raw) == ALL


def test_interrupted_between_subjects_it_goes_on_with_the_zip_it_has(raw, serve, monkeypatch):
    server, bring = serve("zip"), totalsegmentator.bring

    def stop(name, *rest):
        if name == "s0310":
            raise KeyboardInterrupt
        bring(name, *rest)

    with monkeypatch.context() as interruption:
        interruption.setattr(totalsegmentator, "bring", stop)
        assert run("--url", server.url) == 1
    assert run("--url", server.url) == 0
    assert len(server.asked) == 1
    assert held(raw) == ALL


@pytest.mark.parametrize("form", ["zip", "zip with a folder", "folder", "folder in a folder"])
def test_what_was_fetched_by_hand_gives_the_same(raw, tmp_path, form):
    source = tmp_path / "by hand"
    if form.startswith("zip"):
        source.write_bytes(zipped(folder="small/" if "with" in form else ""))
    else:
        with zipfile.ZipFile(
            io.BytesIO(zipped(folder="small/" if "in" in form else ""))
        ) as archive:
            archive.extractall(source)
    assert run("--from", source) == 0
    assert held(raw) == ALL
    assert source.exists()


def test_a_file_of_the_user_is_never_overwritten(raw, serve, capsys):
    mine = raw / FILES[1]
    mine.write_text("mine")
    assert run("--url", serve("zip").url) == 1
    assert "would be overwritten: take it away" in capsys.readouterr().err
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"<html>", "cannot be read as a whole file (BadZipFile"),
        (zipped({}), "nothing there is named s0011/ct.nii.gz"),
        (
            zipped({"s1": {"ct.nii.gz": b"", "segmentations/liver.nii.gz": b"x" * 99}}),
            "s1/segmentations/liver.nii.gz cannot be read as a whole file",
        ),
    ],
)
def test_a_source_that_is_no_such_set_is_one_sentence(raw, tmp_path, capsys, content, sentence):
    (tmp_path / "a.zip").write_bytes(content)
    assert run("--from", tmp_path / "a.zip") == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert held(raw) == []


def test_a_source_that_is_not_there_is_one_sentence(raw, capsys):
    assert run("--from", "nowhere") == 2
    assert "error: --from nowhere: no such file or folder" in capsys.readouterr().err


def test_importing_the_script_does_nothing(tmp_path):
    for name in ("totalsegmentator.py", "volumes.py"):
        shutil.copy(REPO / "raw" / name, tmp_path)
    command = [sys.executable, "-B", "-c", "import totalsegmentator"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["totalsegmentator.py", "volumes.py"]
