"""Print the speed and memory of slicing, training and prediction as ratios, side by side.

    python tests/benchmark.py --only prediction resuming        a minute or two each
    python tests/benchmark.py --only training --slices 500      an epoch of them, where a GPU is

Volumes are synthetic, 512 x 512 x 130 int16 with a mask, gzipped as scanners' NIfTI files are.
Times of scripts are medians of whole processes, imports included, that take turns.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
SHAPE = (512, 512, 130)
AFFINE = np.diag([-0.7, 0.7, 2.0, 1.0])
LARGE = (512, 512, 260)  # the largest scan of 3D-IRCADb-01

PLAIN_NIBABEL = """
import sys
from concurrent.futures import {pool} as Pool
from pathlib import Path
import nibabel as nib
import numpy as np

def read(path):
    return np.asarray(nib.load(path).dataobj).astype(np.int16, copy=False).shape

if __name__ == "__main__":
    with Pool({workers}) as pool:
        list(pool.map(read, sorted(Path("raw/train").iterdir())))
"""

# What the tutorial's data.py does to its training scans, on today's nibabel: one volume after the
# other as float64, every second row and column, HU cast to uint8, liver slices only, Python lists.
TUTORIAL = """
import os
import nibabel as nib
import numpy as np

imgs, masks = [], []
names = sorted(os.listdir("raw/train"))
for mask_name, image_name in zip(names[::2], names[1::2]):
    mask = nib.load(os.path.join("raw/train", mask_name))
    image = nib.load(os.path.join("raw/train", image_name))
    for k in range(mask.shape[2]):
        mask_2d = np.array(mask.get_fdata()[::2, ::2, k])
        image_2d = np.array(image.get_fdata()[::2, ::2, k])
        if len(np.unique(mask_2d)) != 1:
            masks.append(mask_2d)
            imgs.append(image_2d)
for name, slices in {"imgs": imgs, "masks": masks}.items():
    array = np.ndarray((len(slices), 256, 256), dtype=np.uint8)
    for index, slice_2d in enumerate(slices):
        array[index] = slice_2d.astype(np.int16).astype(np.uint8)
    np.save(f"tutorial_{name}.npy", array)
"""


def write_volumes(folder: Path, count: int) -> None:
    """Write one synthetic patient and as many hard links to it as it takes."""
    folder.mkdir(parents=True)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE), indexing="ij")
    noise = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    image = np.where(x**2 / 0.7 + y**2 / 0.4 < 1, 40, -1000) + 60 * gaussian_filter(noise, 1)
    liver = ((x + 0.3) ** 2 + y**2 < 0.1) & (np.abs(z) < 0.8)
    volumes = {"orig": np.rint(image).astype(np.int16), "liver": liver.astype(np.uint8)}
    for kind, volume in volumes.items():
        first = folder / f"p00_{kind}.nii.gz"
        nib.save(nib.Nifti1Image(volume, AFFINE), first)
        for number in range(1, count):
            os.link(first, folder / f"p{number:02d}_{kind}.nii.gz")


def run(command: list[str], folder: Path) -> tuple[float, float]:
    """Run a command and return its wall time in s and its peak resident memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command[:2]} failed in {folder}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def peak_mib() -> float:
    """Return this process's peak resident memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def workplace(folder: Path, volumes: int) -> Path:
    """Return a folder with data.py, what it imports and a number of patients in raw/train.

    They are written by another process: a child's peak memory counts from its parent's on.
    """
    with ProcessPoolExecutor(1) as pool:
        pool.submit(write_volumes, folder / "raw" / "train", volumes).result()
    for name in ("data.py", "raw/volumes.py", "raw/scans.py"):
        shutil.copy(REPO / name, folder / name)
    return folder


def compare_times(folder: Path, workers: int, repeats: int) -> None:
    """Print data.py's time over plain nibabel's and over the tutorial's."""
    commands = {
        "data.py": ["data.py", "--only", "train", "--workers", str(workers)],
        "nibabel, threads": [
            "-c",
            PLAIN_NIBABEL.format(pool="ThreadPoolExecutor", workers=workers),
        ],
        "nibabel, processes": ["reader.py"],
        "tutorial": ["-c", TUTORIAL],
    }
    reader = PLAIN_NIBABEL.format(pool="ProcessPoolExecutor", workers=workers)
    (folder / "reader.py").write_text(reader)
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            times[name].append(run([sys.executable, *command], folder)[0])
    ours = times.pop("data.py")
    print(f"data.py: median {statistics.median(ours):.2f} s")
    for name, other in times.items():
        ratios = [a / b for a, b in zip(ours, other, strict=True)]
        print(
            f"data.py / {name}: median {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}, n = {repeats})"
        )


def write_prediction(folder: Path) -> None:
    """Write a large scan and the probabilities of a liver of 1.6 litres with ragged outlines."""
    scan = nib.Nifti1Image(np.zeros(LARGE, np.int16), np.diag([-0.7, 0.7, 1.0, 1.0]))
    nib.save(scan, folder / "scan_orig.nii")
    noise = gaussian_filter(np.random.default_rng(0).standard_normal((LARGE[2], 256, 256)), 3)
    z, y, x = np.ogrid[-1 : 1 : LARGE[2] * 1j, -1:1:256j, -1:1:256j]
    ball = 0.1 - ((x + 0.3) / 1.2) ** 2 - (y + 0.1) ** 2 - (z / 2) ** 2
    probabilities = 1 / (1 + np.exp(-np.clip(30 * ball + 60 * noise, -9, 9)))
    np.save(folder / "probabilities.npy", probabilities.astype(np.float16))


def measure_prediction(repeats: int) -> None:
    """Print the time of a large scan's prediction, and that of its mask over it, and its memory."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with ProcessPoolExecutor(1) as pool:  # this one's peak memory is to be the mask's
            pool.submit(write_prediction, folder).result()
        from conftest import load_notebook  # here, because Keras takes seconds to import

        notebook = load_notebook()
        import data

        probabilities = np.load(folder / "probabilities.npy", mmap_mode="r")
        scan, own, exports = folder / "scan_orig.nii", peak_mib(), []
        for _ in range(repeats):
            start = time.perf_counter()
            mask = notebook.make_mask(np.asarray(probabilities), scan, 5)
            data.write_mask(folder / "scan_liver.nii.gz", mask, scan)
            exports.append(time.perf_counter() - start)
        export, more = statistics.median(exports), peak_mib() - own
        model = notebook.unet(256, 16, 128.0, 64.0)
        notebook.compute_in(model, notebook.choose_precision("auto"))
        slices, predictions = np.zeros((LARGE[2], 256, 256), np.uint8), []
        for _ in range(1 + repeats):  # the first time builds the graph
            start, numbers = time.perf_counter(), {"scan": np.arange(LARGE[2])}
            notebook.predict_slices(model, slices, numbers, 10, folder / "predicted.npy")
            predictions.append(time.perf_counter() - start)
    prediction = statistics.median(predictions[1:])
    print(
        f"a scan of {LARGE} in {model.layers[1].dtype_policy.name}: predicted in "
        f"{prediction:.1f} s (the first time {predictions[0] / prediction:.2f} times that), its "
        f"mask takes {export / prediction:.2f} times as long, {more:.0f} MiB, n = {repeats}"
    )


def time_epoch(model, batches) -> float:
    """Return the seconds from the end of one epoch to that of the next."""
    import keras

    ends: list[float] = []
    stamp = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: ends.append(time.perf_counter())
    )
    model.fit(batches, epochs=2, shuffle=False, verbose=0, callbacks=[stamp])
    return ends[1] - ends[0]


def compare_training(repeats: int, slices: int) -> None:
    """Print the time of an epoch over the tutorial's, and how much of it is reading.

    The tutorial's is that of its network, with 32 filters and Adam, on slices as they are, in the
    same precision and batches of 10 like ours. Slices come from memory; at hand are those that were
    read and augmented before. With few slices reading hardly overlaps learning, so its share is an
    upper bound.
    """
    import keras
    from conftest import load_notebook

    class AtHand(keras.utils.PyDataset):
        def __init__(self, ready):
            super().__init__()
            self.ready = ready

        def __len__(self):
            return len(self.ready)

        def __getitem__(self, index):
            return self.ready[index]

    notebook = load_notebook()
    policy, random = notebook.choose_precision("auto"), np.random.default_rng(0)
    imgs = random.integers(0, 256, (slices, 256, 256), np.uint8)

    def model_of(ours: bool):
        model = notebook.unet(256, 16 if ours else 32, 128.0, 64.0, normalize=ours)
        notebook.compute_in(model, policy)
        optimizer = notebook.Muon(1e-3, model.layers[1].compute_dtype) if ours else "adam"
        model.compile(optimizer, notebook.dice_and_cross_entropy, metrics=[notebook.Dice()])
        return model

    def batches_of(augment, at_hand: bool = False):
        batches = notebook.Batches(imgs, imgs // 128, range(slices), 10, 0, augment)
        if at_hand:
            return AtHand([batches[n] for n in range(len(batches))])
        return batches

    ours, theirs = model_of(True), model_of(False)
    trainings = {
        "ours": (ours, batches_of(notebook.augment)),
        "at hand": (ours, batches_of(notebook.augment, at_hand=True)),
        "theirs": (theirs, batches_of(None)),
        "theirs at hand": (theirs, batches_of(None, at_hand=True)),
    }
    for training in tqdm(trainings.values(), "first epochs"):
        time_epoch(*training)  # the first time builds the graph
    rounds = tqdm(range(repeats), "epochs", unit=" rounds")
    times = pd.DataFrame(
        [{name: time_epoch(*of) for name, of in trainings.items()} for _ in rounds]
    )
    print(f"an epoch of {slices} slices in {policy} over the tutorial's, n = {repeats}")
    for name, ratio in {
        "ours": times.ours / times.theirs,
        "both with slices at hand": times["at hand"] / times["theirs at hand"],
    }.items():
        print(f"  {name}: median {ratio.median():.2f} ({ratio.min():.2f} to {ratio.max():.2f})")
    waits = 1 - times["at hand"] / times.ours
    step_ms = 1000 * times.ours.median() / -(-slices // 10)
    print(
        f"  reading and augmenting: median {waits.median():.1%} of ours "
        f"({waits.min():.1%} to {waits.max():.1%}), a step of which takes {step_ms:.1f} ms"
    )


def write_slices(folder: Path) -> None:
    """Write the slices of six synthetic patients, 128 x 128, into a folder."""
    (folder / "raw").mkdir()
    for name in ("data.py", "raw/volumes.py", "raw/scans.py", "raw/phantom.py"):
        shutil.copy(REPO / name, folder / name)
    run([sys.executable, "raw/phantom.py", "--test", "0"], folder)
    run([sys.executable, "data.py", "--size", "128"], folder)


def compare_dice(folder: Path, most: int = 5, wanted: float = 0.93) -> None:
    """Print how long a Dice of 0.93 takes on a synthetic patient held out, with START and without.

    At most five epochs, in which the learning rate falls to 0.
    """
    import keras
    from conftest import load_notebook

    write_slices(folder)
    notebook = load_notebook()
    imgs, masks = (np.load(folder / f"{name}_train.npy") for name in ("imgs", "masks"))
    patients = pd.read_csv(folder / "slices_train.csv").patient
    held = (patients == patients.iloc[-1]).to_numpy()
    batches = notebook.Batches(imgs, masks, np.flatnonzero(~held), 10, 0, notebook.augment)
    options = {"validation_data": notebook.Batches(imgs, masks, np.flatnonzero(held), 10)}
    options |= {"epochs": 1, "shuffle": False, "verbose": 0}
    for name, start in {"begun": REPO / "preds/synthetic.keras", "from scratch": None}.items():
        keras.utils.set_random_seed(0)
        model = notebook.unet(128, 16, float(imgs[~held].mean()), float(imgs[~held].std()))
        model = notebook.begin_with(start, model) if start else model
        notebook.compute_in(model, notebook.choose_precision("auto"))
        rate = notebook.learning_rate(1e-3, most * len(batches))
        optimizer = notebook.Muon(rate, model.layers[1].compute_dtype)
        model.compile(optimizer, notebook.dice_and_cross_entropy, metrics=[notebook.Dice()])
        begun, found = time.perf_counter(), []
        while max(found, default=0) < wanted and len(found) < most:
            found += model.fit(batches, **options).history["val_dice"]
        seconds = time.perf_counter() - begun
        print(f"{name}: a Dice of {found[-1]:.3f} after {len(found)} epochs, {seconds:.0f} s")


def measure_resuming(folder: Path, repeats: int) -> None:
    """Print how long keeping a training takes after an epoch, and going on, in steps of it."""
    from conftest import load_notebook

    notebook = load_notebook()
    model = notebook.unet(256, 16, 128.0, 64.0)
    notebook.compute_in(model, notebook.choose_precision("auto"))
    model.compile(notebook.Muon(1e-3), notebook.dice_and_cross_entropy, metrics=[notebook.Dice()])
    imgs = np.zeros((10, 256, 256, 1), np.uint8)
    progress = notebook.Progress(model, folder / "training.npz", {}, "loss")
    times: dict[str, list[float]] = {"step": [], "keeping": [], "going on": []}
    model.train_on_batch(imgs, imgs)  # the first time builds the graph
    for epoch in range(repeats):
        for name, work in {
            "step": lambda: model.train_on_batch(imgs, imgs),
            "keeping": lambda epoch=epoch: progress.on_epoch_end(epoch, {"loss": 1 / (1 + epoch)}),
            "going on": progress.resume,
        }.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    step, keeping, going_on = (statistics.median(of) for of in times.values())
    size = (folder / "training.npz").stat().st_size / 1e6
    print(
        f"keeping a training takes {keeping / step:.2f} steps of it an epoch, {size:.0f} MB, going "
        f"on {going_on / step:.2f}; n = {repeats}"
    )


ON_DEVICES = """
import time, numpy as np, keras
from conftest import load_notebook
count = len(keras.distribution.list_devices())
keras.distribution.set_distribution(keras.distribution.DataParallel())
notebook = load_notebook()
imgs = np.random.default_rng(0).integers(0, 256, (80, 128, 128), np.uint8)
model = notebook.unet(128, 16, 128.0, 64.0)
model.compile(notebook.Muon(1e-3), notebook.dice_and_cross_entropy, metrics=[notebook.Dice()])
batches = notebook.Batches(imgs, imgs // 128, range(80), 8, 0, None, count)
for _ in range(3):
    start = time.perf_counter()
    model.fit(batches, shuffle=False, verbose=0)
print(time.perf_counter() - start)
"""


def compare_devices(repeats: int) -> None:
    """Print an epoch's time on four simulated devices of JAX over that on one, in turn."""
    ratios = []
    for _ in range(repeats):
        seconds = []
        for count in (4, 1):
            environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
            command = [sys.executable, "-c", ON_DEVICES]
            options = {"cwd": REPO / "tests", "env": environment, "check": True}
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, **options).stdout
            seconds.append(float(said.split()[-1]))
        ratios.append(seconds[0] / seconds[1])
    print(
        f"an epoch on four simulated devices of JAX over one: median "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, n = {repeats})"
    )


def compare_volumes(folder: Path, options: argparse.Namespace) -> None:
    """Print data.py's time beside others' on some volumes, and its peak memory on 2 and on 16."""
    place = workplace(folder / "time", options.volumes)
    print(f"{options.volumes} volumes of {SHAPE}, {options.workers} workers")
    compare_times(place, options.workers, options.repeats)
    for volumes in (2, 16):
        command = [sys.executable, "data.py", "--workers", str(options.workers)]
        peak = run(command, workplace(folder / f"{volumes}", volumes))[1]
        print(f"peak memory with {volumes} volumes: {peak:.0f} MiB")


SECTIONS = {
    "volumes": compare_volumes,
    "prediction": lambda folder, options: measure_prediction(options.repeats),
    "training": lambda folder, options: compare_training(options.repeats, options.slices),
    "dice": lambda folder, options: compare_dice(folder),
    "resuming": lambda folder, options: measure_resuming(folder, options.repeats),
    "devices": lambda folder, options: compare_devices(options.repeats),
}


def main() -> None:
    """Print the sections that are asked for, all but "devices", which needs JAX, by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slices", type=int, default=20, help="of an epoch of training")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", help="print these alone")
    options = parser.parse_args()
    for name in options.only or [name for name in SECTIONS if name != "devices"]:
        with tempfile.TemporaryDirectory() as folder:
            SECTIONS[name](Path(folder), options)


if __name__ == "__main__":
    main()
