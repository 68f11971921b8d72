"""Measure recipes by whole patients, with data.py and the notebook's own cells.

    python tests/evaluate.py ours repaired --scans ../shared/scans --folder /tmp/runs

trains on the patients of SCANS/train and scores those of SCANS/test, which hold scans as raw/train
and raw/test do. With `--leave-out` it scores each patient inside SCANS/train by a training without
him, with `--leave-out 3` in three trainings. A recipe is the notebook with other parameters, or
with a few lines exchanged, and RECIPES has them all. `--size 128 -p FILTERS 16` makes it quick.
Every training has a folder of its own with what it printed; a finished one is not run again, so
the table, printed and written to FOLDER/results.csv, can grow over several calls.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
ONE_PATIENT = [{"lits_006", "lits_008", "lits_010"}]  # scans of one patient in ../shared/scans
LAST_SECTION = "## Draw the outlines"  # from here on the notebook draws and scores no more

# Lines of the notebook and what stands there instead.
DICE_ALONE = {"(optimizer, dice_and_cross_entropy": "(optimizer, dice_loss"}
LAST_FIFTH_OF_SLICES = {
    "is_held = train.slices.patient.isin(held).to_numpy()": (
        "is_held = np.arange(len(train.slices)) >= 0.8 * len(train.slices)"
    )
}
CONVOLVE_TWICE = """
        for _ in range(2):
            x = layers.Conv2D(count, 3, padding="same", activation="relu", **kernel)(x)
        return x
"""
NOT_HELD = {"return options if normalize else {}": "return {}"}
NORMALIZE_PAIRS = NOT_HELD | {  # recipe G's: Ioffe and Szegedy 2015, arXiv 1502.03167
    CONVOLVE_TWICE: """
        x = layers.Conv2D(count, 3, padding="same", activation="relu")(x)
        x = layers.Conv2D(count, 3, padding="same", use_bias=False)(x)
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
"""
}
NORMALIZE_SLICES = {  # Ulyanov et al. 2016, arXiv 1607.08022
    old: new.replace("BatchNormalization(momentum=0.9)", "GroupNormalization(groups=-1)")
    for old, new in NORMALIZE_PAIRS.items()
}
NORMALIZE_AT_POOLINGS = NOT_HELD | {
    "layers.MaxPooling2D()(x)": (
        "layers.BatchNormalization(momentum=0.9)(layers.MaxPooling2D()(x))"
    ),
    "**kernel_up)(x)": "**kernel_up)(layers.BatchNormalization(momentum=0.9)(x))",
}
NO_MOVEMENT = {
    "random.uniform(-30, 30)": "0 * random.uniform(-30, 30)",
    "random.uniform(-0.36, 0.36)": "0 * random.uniform(-0.36, 0.36)",
    "random.uniform(-0.1, 0.1, 2)": "0 * random.uniform(-0.1, 0.1, 2)",
}
LESS_MOVEMENT = {
    "uniform(-30, 30)": "uniform(-15, 15)",
    "uniform(-0.36, 0.36)": "uniform(-0.22, 0.22)",
}
STRETCHED = {
    "    middle = np.full(2, size / 2)": """
    turn = turn @ np.diag(np.exp(random.uniform(-0.15, 0.15, 2)))
    middle = np.full(2, size / 2)"""
}
BLURRED = {  # with a deviation of up to 1.5 pixels at 256 x 256
    "from PIL import Image": "from PIL import Image, ImageFilter",
    "    size = len(img)\n    angle": """
    size = len(img)
    blur = ImageFilter.GaussianBlur(random.uniform(0, size / 170))
    img = np.asarray(Image.fromarray(img).filter(blur))
    angle""",
}
MOVED_MASK = "move(mask, Image.Resampling.NEAREST)"
SMOOTH_MASK = "move(mask * np.uint8(255), Image.Resampling.BILINEAR)"
SOFT_MASKS = {MOVED_MASK: f"{SMOOTH_MASK} / np.float32(255)"}
SLOWER_AUGMENTATION = {  # recipe J's
    MOVED_MASK: f"({SMOOTH_MASK} >= 128).astype(np.uint8)",
    "four.sum(axis=0, dtype=np.float32)": (
        "510 + 147.8 * random.standard_normal(img.shape, np.float32)"
    ),
}
DROPOUT = {  # as in Ronneberger et al. 2015
    "    x = convolve_twice(x, counts[-1])": (
        "    x = layers.Dropout(0.5)(convolve_twice(x, counts[-1]))"
    )
}
DILATED = {  # as in Yu and Koltun 2016, arXiv 1511.07122: the lowest level sees 268 pixels, not 140
    "    x = convolve_twice(x, counts[-1])": """
    for apart in (2, 4):
        options = {"padding": "same", "activation": "relu", "dilation_rate": apart, **kernel}
        x = layers.Conv2D(counts[-1], 3, **options)(x)"""
}
RESIDUAL = {
    CONVOLVE_TWICE: """
        x = layers.Conv2D(count, 3, padding="same", activation="relu", **kernel)(x)
        y = layers.Conv2D(count, 3, padding="same", activation="relu", **kernel)(x)
        return layers.Average()([x, y])
"""
}
LEAKY = {'activation="relu"': 'activation="leaky_relu"'}
SILU = {'activation="relu"': 'activation="silu"'}  # Elfwing et al. 2017, arXiv 1702.03118
DEEP = {  # coarser masks are asked for on the way up too: Lee et al. 2014, arXiv 1409.5185
    "    x = convolve_twice(x, counts[-1])": "    x, coarse = convolve_twice(x, counts[-1]), []",
    "        x = convolve_twice(layers.Concatenate()([x, skip]), count)": """
        x = convolve_twice(layers.Concatenate()([x, skip]), count)
        coarse.append(x)""",
    '    outputs = layers.Conv2D(1, 1, activation="sigmoid", name="liver")(x)': """
    outputs = []
    for n, y in enumerate(coarse[:0:-1]):
        y = layers.Conv2D(1, 1, activation="sigmoid", name=f"liver_{n}")(y)
        outputs.append(layers.UpSampling2D(2**n, interpolation="bilinear", name=f"liver_up_{n}")(y))
    outputs = layers.Concatenate(name="liver")(outputs)""",
    "inner = layer is not network.layers[-1]": 'inner = not layer.name.startswith("liver")',
    "    return dice_loss(y_true, y_pred) + ops.mean(ops.binary_crossentropy(y_true, y_pred))": """
    loss = 0
    for n, weight in enumerate((4 / 7, 2 / 7, 1 / 7)) if y_pred.shape[-1] == 3 else [(0, 1.0)]:
        p = y_pred[..., n : n + 1]
        loss += weight * (dice_loss(y_true, p) + ops.mean(ops.binary_crossentropy(y_true, p)))
    return loss""",
    "ops.cast(y_pred >= 0.5": "ops.cast(y_pred[..., :1] >= 0.5",
}
CUTMIX = {  # Yun et al. 2019, arXiv 1905.04899
    "            imgs, masks = (np.stack(arrays) for arrays in zip(*pairs, strict=True))\n": """
            imgs, masks = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
            pasted, pasted_masks, side = imgs.copy(), masks.copy(), imgs.shape[1]
            for n, other in enumerate(random.permutation(len(imgs))):
                if random.uniform() < 0.5:
                    height, width = random.integers(side // 8, side // 2, 2)
                    row = random.integers(0, side - height)
                    column = random.integers(0, side - width)
                    box = slice(row, row + height), slice(column, column + width)
                    pasted[n][box], pasted_masks[n][box] = imgs[other][box], masks[other][box]
            imgs, masks = pasted, pasted_masks
"""
}
RATE_ENDS_HIGHER = {"warmup_steps=rising": "warmup_steps=rising, alpha=0.3"}
MORE_LIGHT = {
    "uniform(-0.25, 0.25)), np.exp(random.uniform(-0.3, 0.3)": (
        "uniform(-0.4, 0.4)), np.exp(random.uniform(-0.5, 0.5)"
    ),
    "random.uniform(-25, 25)": "random.uniform(-40, 40)",
}
DOWN_TO_HALF = {"np.exp(random.uniform(-0.25, 0.25)), ": "np.exp(random.uniform(-0.7, 0.25)), "}
LESS_AGENT = {  # what is above 40 HU, as organs and vessels are, has less contrast
    "grays = contrast * (np.arange(256) - 127.5) +": """grays = np.arange(256) - 127.5
    grays[128:] *= np.exp(random.uniform(-0.8, 0))
    grays = contrast * grays +"""
}
LESS_AGENT_IN_HALF = {  # of the slices
    old: new.replace("random.uniform(-0.8, 0)", "min(random.uniform(-0.8, 0.8), 0)")
    for old, new in LESS_AGENT.items()
}
KERNEL_STEP = "matrix.shape[0] ** 0.5 * orthogonalize(matrix, self.matrix_dtype)"
SPOTS = {  # up to three rectangles of one gray value each, the mask stays
    "    return noisy.astype(np.uint8), move(": """
    for _ in range(random.integers(0, 4)):
        row, column = random.integers(0, size, 2)
        height, width = random.integers(size // 32, size // 6, 2)
        noisy[row : row + height, column : column + width] = random.integers(0, 256)
    return noisy.astype(np.uint8), move("""
}
AS_THEY_ARE_AT_THE_END = {
    "        if self.augment:\n": "        if self.augment and self.epoch <= EPOCHS - 3:\n"
}
CROSS_ENTROPY = "ops.mean(ops.binary_crossentropy(y_true, y_pred))"
SAME_LIGHT = {"grays[move(img, Image.Resampling.BILINEAR)]": "move(img, Image.Resampling.BILINEAR)"}
NO_NOISE = {"deviation / 147.8": "0"}
NEIGHBOURS = {  # as channels; beyond the ends of a scan they are those of the next scan
    "imgs = self.imgs[numbers]\n": """
        beside = [np.clip(numbers + step, 0, len(self.imgs) - 1) for step in (-1, 0, 1)]
        imgs = np.stack([self.imgs[numbers] for numbers in beside], axis=-1)
""",
    "return (imgs[..., None],)": "return (imgs,)",
    "return imgs[..., None], masks": "return imgs, masks",
    "keras.Input((size, size, 1)": "keras.Input((size, size, 3)",
}
AVERAGED_WEIGHTS = {
    "Muon(rate, matrix_dtype) if": "Muon(rate, matrix_dtype, use_ema=True, ema_momentum=0.99) if",
    "            self.network.set_weights(self.model.get_weights())": """
            weights = self.model.get_weights()
            self.model.optimizer.finalize_variable_values(self.model.trainable_variables)
            self.network.set_weights(self.model.get_weights())
            self.model.set_weights(weights)""",
}
WEIGHT_DECAY = {  # by 0.3 % a step at a learning rate of 1e-3
    "Muon(rate, matrix_dtype) if": "Muon(rate, matrix_dtype, weight_decay=3) if",
}
TUTORIAL = {
    "MUON": False,
    "NORMALIZE": False,
    "AUGMENT": False,
    "DECAY": False,
    "SMOOTH_MM": 0,
}
RECIPES = {  # parameters of the notebook, exchanged lines
    "ours": ({}, {}),
    "tutorial": (TUTORIAL | {"PRECISION": "float32"}, DICE_ALONE | LAST_FIFTH_OF_SLICES),
    "repaired": (TUTORIAL | {"PRECISION": "float32"}, DICE_ALONE),
    "repaired + cross-entropy": (TUTORIAL, {}),
    "small slices first": ({"SMALL_SHARE": 0.5}, {}),
    "not smoothed": ({"SMOOTH_MM": 0}, {}),
    "batches of 5": ({"BATCH_SIZE": 5}, {}),
    "Adam": ({"MUON": False}, {}),
    "Adam, batches of 5": ({"MUON": False, "BATCH_SIZE": 5}, {}),
    "rate of 3e-3": ({"LEARNING_RATE": 3e-3}, {}),
    "not normalised": ({"NORMALIZE": False}, {}),
    "not normalised, weight decay": ({"NORMALIZE": False}, WEIGHT_DECAY),
    "batch normalisation": ({}, NORMALIZE_PAIRS),
    "batch normalisation at poolings": ({}, NORMALIZE_AT_POOLINGS),
    "batch normalisation at poolings, weight decay": ({}, NORMALIZE_AT_POOLINGS | WEIGHT_DECAY),
    "no augmentation": ({"AUGMENT": False}, {}),
    "no movement": ({}, NO_MOVEMENT),
    "less movement": ({}, LESS_MOVEMENT),
    "same light": ({}, SAME_LIGHT),
    "more light": ({}, MORE_LIGHT),
    "contrast down to a half": ({}, DOWN_TO_HALF),
    "less contrast agent": ({}, LESS_AGENT),
    "less contrast agent in half": ({}, LESS_AGENT_IN_HALF),
    "no noise": ({}, NO_NOISE),
    "slower augmentation": ({}, SLOWER_AUGMENTATION),
    "less movement, no noise": ({}, LESS_MOVEMENT | NO_NOISE),
    "Adam, less movement, no noise": (
        {"MUON": False, "BATCH_SIZE": 5},
        LESS_MOVEMENT | NO_NOISE,
    ),
    "stretched": ({}, STRETCHED),
    "blurred": ({}, BLURRED),
    "soft masks": ({}, SOFT_MASKS),
    "dropout": ({}, DROPOUT),
    "dropout, stretched": ({}, DROPOUT | STRETCHED),
    "leaky ReLU": ({}, LEAKY),
    "SiLU": ({}, SILU),
    "deep supervision": ({}, DEEP),
    "CutMix": ({}, CUTMIX),
    "dilated": ({}, DILATED),
    "residual": ({}, RESIDUAL),
    "instance normalisation": ({}, NORMALIZE_SLICES),
    "spots": ({}, SPOTS),
    "not augmented at the end": ({}, AS_THEY_ARE_AT_THE_END),
    "cross-entropy x 3": ({}, {CROSS_ENTROPY: f"3 * {CROSS_ENTROPY}"}),
    "no patient held out": ({"VALIDATION_SHARE": 0, "VALIDATION_PATIENTS": []}, {}),
    "rate ends at 0.3": ({}, RATE_ENDS_HIGHER),
    "steps x 1.6": ({}, {KERNEL_STEP: f"1.6 * {KERNEL_STEP}"}),
    "steps x 0.6": ({}, {KERNEL_STEP: f"0.6 * {KERNEL_STEP}"}),
    "steps x 2": ({}, {KERNEL_STEP: f"2 * {KERNEL_STEP}"}),
    "steps x 0.2": ({}, {KERNEL_STEP: f"0.2 * {KERNEL_STEP}"}),
    "rate x 5 but for kernels": ({"LEARNING_RATE": 5e-3}, {KERNEL_STEP: f"0.2 * {KERNEL_STEP}"}),
    "constant learning rate": ({"DECAY": False}, {}),
    "Dice loss alone": ({}, DICE_ALONE),
    "three slices": ({}, NEIGHBOURS),
    "averaged weights": ({}, AVERAGED_WEIGHTS),
    "slices with liver alone": ({}, {}),
    "narrower window": ({}, {}),
    "wider window": ({}, {}),
    "widest window": ({}, {}),
    "one pixel spacing": ({}, {}),
    "oblique, same steps": ({"EPOCHS": 7}, {}),  # on 3 times the slices
    "oblique, same epochs": ({}, {}),
    "two views": ({"VIEWS": 2}, {}),
    "four views": ({"VIEWS": 4}, {}),
    "oblique, two views": ({"VIEWS": 2}, {}),
    "tested with less contrast agent": ({}, {}),
    "tested 30 HU darker": ({}, {}),
    "less contrast agent, tested with less": ({}, {}),
}
SLICING_OPTIONS = {
    "oblique, same steps": ["--oblique", "2"],
    "oblique, same epochs": ["--oblique", "2"],
}
TRAINED_AS = {
    "not smoothed": "ours",
    "two views": "ours",
    "four views": "ours",
    "oblique, two views": "oblique, same epochs",
    "tested with less contrast agent": "ours",
    "tested 30 HU darker": "ours",
    "less contrast agent, tested with less": "less contrast agent",
}  # these need no training of their own

# Lines of data.py and what stands there instead.
IN_WINDOW = "    low, high = WINDOW_HU\n"
WITH_LESS_AGENT = {IN_WINDOW: f"    hu = np.where(hu > 45, 45 + 0.45 * (hu - 45), hu)\n{IN_WINDOW}"}
DATA_LINES = {
    "narrower window": {"WINDOW_HU = (-160.0, 240.0)": "WINDOW_HU = (-100.0, 200.0)"},
    "wider window": {"WINDOW_HU = (-160.0, 240.0)": "WINDOW_HU = (-200.0, 300.0)"},
    "widest window": {"WINDOW_HU = (-160.0, 240.0)": "WINDOW_HU = (-300.0, 400.0)"},
    "one pixel spacing": {"sides_mm / sides_mm.max() *": "sides_mm / max(500, *sides_mm) *"},
    "tested with less contrast agent": WITH_LESS_AGENT,
    "tested 30 HU darker": {IN_WINDOW: f"    hu = hu - 30\n{IN_WINDOW}"},
    "less contrast agent, tested with less": WITH_LESS_AGENT,
}
# How a training's slices are made where data.py alone does not make them.
WITH_LIVER = """
import numpy as np
import data

data.main()
imgs, masks, slices = data.load_train_data()
liver = (slices.liver == 1).to_numpy()
for name, array in {"imgs": np.array(imgs[liver]), "masks": np.array(masks[liver])}.items():
    np.save(f"{name}_train.npy", array)
slices[liver].to_csv("slices_train.csv", index=False)
"""
SLICING = {
    "tutorial": f"""
import numpy as np
import data

data.to_gray = lambda hu: hu.astype(np.int16).astype(np.uint8)  # wraps around
data.resize = lambda a, rows, columns: a[:: a.shape[0] // rows, :: a.shape[1] // columns]
{WITH_LIVER}""",
    "slices with liver alone": WITH_LIVER,
}


def patient_of(path):
    """Return the name of a scan: p1 for p1_orig.nii.gz and p1_liver.nii.gz."""
    return re.sub(r"_(orig|liver)\.nii(\.gz)?$", "", path.name)


def group_patients(folder):
    """Return the scans of a folder, with how many bytes, as lists of those of one patient."""
    sizes = {patient_of(path): path.stat().st_size for path in folder.glob("*_orig.nii*")}
    groups = [sizes.keys() & group for group in ONE_PATIENT]
    alone = [{name} for name in sizes.keys() - set().union(*groups)]
    groups = [sorted(group) for group in [*groups, *alone] if group]
    return sorted(groups, key=lambda group: (-sum(sizes[name] for name in group), group)), sizes


def split_patients(scans, leave_out):
    """Return for each training its name and which scans it trains, validates and is tested on.

    leave_out : None to test on SCANS/test, 0 to leave out each patient of SCANS/train in turn,
        N to leave out one of N parts of about equal size; the smallest patient left validates
    """
    groups, sizes = group_patients(scans / "train")
    if leave_out is None:
        return {"test": (sum(groups, []), [], sum(group_patients(scans / "test")[0], []))}
    parts = [[] for _ in range(leave_out or len(groups))]
    for group in groups:
        min(parts, key=lambda part: sum(sizes[name] for name in sum(part, []))).append(group)
    folds = {}
    for part in parts:
        trained, tested = [group for group in groups if group not in part], sum(part, [])
        folds[f"without {' '.join(tested)}"] = (sum(trained, []), trained[-1], tested)
    return folds


def lay_out(folder, recipe, scans, trained, tested):
    """Fill a folder with data.py and with links to the scans of a training."""
    shutil.rmtree(folder, ignore_errors=True)
    for split, names in {"train": trained, "test": tested}.items():
        (folder / "raw" / split).mkdir(parents=True)
        for path in scans.glob("*/*.nii*"):
            if patient_of(path) in names:
                (folder / "raw" / split / path.name).symlink_to(path.resolve())
    script = (REPO / "data.py").read_text(encoding="utf-8")
    script = exchange(script, DATA_LINES.get(recipe, {}))
    (folder / "data.py").write_text(script, encoding="utf-8")


def exchange(script, lines):
    """Return a script with lines exchanged; raises ValueError for one that is not there once."""
    for old, new in lines.items():
        if script.count(old) != 1:
            raise ValueError(f"{old!r} is {script.count(old)} times in the code, wanted once")
        script = script.replace(old, new)
    return script


def as_script(parameters, exchanged):
    """Return the notebook's code up to the scores as one script, with lines exchanged."""
    parts = ["display = print"]
    for cell in json.loads((REPO / "train.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if source.startswith(LAST_SECTION):
            break
        if cell["cell_type"] == "code":
            parts.append(source)
        if "parameters" in cell["metadata"].get("tags", []):
            parts += [f"{name} = {value!r}" for name, value in parameters.items()]
    return exchange("\n\n".join(parts), exchanged)


def train(folder, recipe, size, given):
    """Slice, train and score in a folder; what is printed goes to its file log."""
    changed, exchanged = RECIPES[recipe]
    (folder / "train.py").write_text(as_script({**given, **changed}, exchanged), encoding="utf-8")
    (folder / "slice.py").write_text(SLICING.get(recipe, "import data\n\ndata.main()"))
    slicing = ["slice.py", "--size", size, *SLICING_OPTIONS.get(recipe, [])]
    environment = os.environ | {"MPLBACKEND": "Agg"}
    with open(folder / "log", "w") as log:
        for command in (slicing, ["train.py"]):
            subprocess.run(
                [sys.executable, *command],
                **dict(cwd=folder, env=environment, stdout=log, stderr=log, check=True),
            )
    for array in folder.rglob("*.npy"):
        array.unlink()


def read_result(folder):
    """Return a table with a row for each scored patient of a finished training."""
    scores = pd.read_csv(folder / "preds" / "metrics.csv")
    history = folder / "preds" / "history.csv"
    none = pd.Series([float("nan")])
    validation = pd.read_csv(history).get("val_dice", none) if history.exists() else none
    lines = (folder / "log").read_text().replace("\r", "\n")  # progress bars return the carriage
    seconds = re.findall(r"epoch \d+/.* (\d+) s", lines)
    return scores[~scores.patient.isin(["mean", "worst"])].assign(
        best_validation=validation.max(),
        last_validation=validation.iloc[-1],
        minutes=sum(map(float, seconds)) / 60,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", choices=RECIPES)
    parser.add_argument("--scans", type=Path, default=REPO.parent / "shared" / "scans")
    parser.add_argument("--folder", type=Path, required=True, help="where the trainings are kept")
    parser.add_argument("--leave-out", type=int, nargs="?", const=0, metavar="PARTS")
    parser.add_argument("--size", default="256", help="of the slices")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args()

    folds = split_patients(options.scans, options.leave_out)
    given = {name: json.loads(value) for name, value in options.p}

    def folder_of(recipe: str, seed: int, fold: str) -> Path:
        name = " ".join([recipe, fold, options.size, str(seed), *sum(options.p, [])])
        return options.folder.resolve() / re.sub(r"\W+", "_", name)

    results = []
    todo = [(r, s, f) for r in options.recipes for s in options.seeds for f in folds]
    for recipe, seed, fold in tqdm(todo, unit=" trainings"):
        trained, validated, tested = folds[fold]
        folder = folder_of(recipe, seed, fold)
        if not (folder / "preds" / "metrics.csv").exists():
            parameters = {**given, "SEED": seed, "VALIDATION_PATIENTS": validated}
            if recipe in TRAINED_AS:
                model = folder_of(TRAINED_AS[recipe], seed, fold) / "preds" / "unet.keras"
                parameters["WEIGHTS"] = str(model)
            lay_out(folder, recipe, options.scans, trained, tested)
            train(folder, recipe, options.size, parameters)
        results.append(read_result(folder).assign(recipe=recipe, seed=seed))
    table = pd.concat(results, ignore_index=True)
    table.to_csv(options.folder / "results.csv", index=False, float_format="%.4f")
    one = {scan: min(group) for group in ONE_PATIENT for scan in group}
    table["patient"] = table.patient.replace(one)
    recipe = ["recipe", "seed"]
    patients = table.groupby([*recipe, "patient"], sort=False).dice.mean()
    mean = patients.groupby(recipe, sort=False).agg(["count", "mean"])  # of patients
    worst = table.groupby(recipe, sort=False).dice.min().rename("worst scan")
    print(mean.join(worst).round(4).to_string())


if __name__ == "__main__":
    main()
