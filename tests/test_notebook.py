"""The form of train.ipynb and its functions, taken from the notebook without copying them."""

import ast
import json
import re
import shutil
import subprocess
import types

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import REPO, dice, save_patient
from keras import ops
from scipy import ndimage
from skimage.io import imread

import data

YELLOW, CYAN = (255, 255, 0), (0, 255, 255)


def code_cells(text=None):
    """Return the code cells of a notebook given as text, or of train.ipynb."""
    text = text or (REPO / "train.ipynb").read_text(encoding="utf-8")
    return [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def code(cell):
    return "".join(cell["source"])


def find_code(words):
    """Return the code of the cell that holds these words."""
    (found,) = [code(cell) for cell in code_cells() if words in code(cell)]
    return found


def parameters(cells):
    """Return {name: value} of the one cell tagged parameters, which holds literals alone."""
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    statements = ast.parse(code(cell)).body
    return {s.targets[0].id: ast.literal_eval(s.value) for s in statements}


@pytest.fixture(scope="module")
def committed():
    """Return the notebook as committed, as text, whatever the user has changed or run since."""
    if not shutil.which("git"):
        pytest.skip("needs git to see what is committed")
    shown = subprocess.run(["git", "show", ":train.ipynb"], cwd=REPO, capture_output=True)
    if shown.returncode:
        pytest.skip("needs the git repository to see what is committed")
    return shown.stdout.decode()


def texts(part):
    """Yield all text in a part of a notebook but its pictures."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict):
        yield from texts([item for name, item in part.items() if name != "image/png"])
    elif isinstance(part, list):
        for item in part:
            yield from texts(item)


def test_what_is_committed_is_as_one_run_from_top_to_bottom_left_it(committed):
    cells = code_cells(committed)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert len(committed) < 2e6


def test_what_is_committed_holds_no_path_of_a_machine_and_no_debris_of_progress_bars(committed):
    machine = re.compile(r"(?<![\w.])/(home|root|tmp|work)\b|\b[A-Z]:\\|[\r\b]")
    assert not [text for text in texts(json.loads(committed)) if machine.search(text)]


def test_the_defaults_are_the_tutorials_where_nothing_better_was_measured(committed):
    values = parameters(code_cells(committed))
    assert all(name.isupper() for name in values)
    assert values["EPOCHS"] == 20
    assert values["LEARNING_RATE"] == 1e-3
    assert values["FILTERS"] == 16  # the tutorial's 32 bring nothing more than START does
    assert values["START"] == "preds/synthetic.keras"
    assert values["BATCH_SIZE"] == 10
    assert values["VALIDATION_SHARE"] == 0.1  # of the patients; the tutorial's 0.2 of the slices


def test_imports_stand_in_the_first_code_cell_and_no_backend_is_called_but_keras():
    for number, cell in enumerate(code_cells()):
        nodes = list(ast.walk(ast.parse(code(cell))))  # a magic would be no Python
        assert number == 0 or not any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes)
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        assert not {"tf", "tensorflow", "torch", "jax"} & names


def run_from_the_top(**changed):
    """Run the notebook's code with other parameters, as far as it goes."""
    names = {}
    for cell in code_cells():
        exec(code(cell), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= {"START": ""} | changed


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("EPOCHS", 0, "a whole number above 0"),
        ("EPOCHS", 2.5, "a whole number above 0"),
        ("SEED", -1, "a whole number from 0 on"),
        ("EPOCHS", True, "a whole number above 0"),  # `yes` in YAML, would count as 1
        ("LEARNING_RATE", 0.0, "a number above 0, such as 0.001"),
        ("LEARNING_RATE", "1e-3", "a number above 0, such as 0.001"),  # 1e-3 in YAML is text
        ("VALIDATION_SHARE", 50, "a number from 0 to below 1"),
        ("VALIDATION_PATIENTS", "p1", "a list of names"),
        ("AUGMENT", "false", "True or False"),  # would count as True
        ("MODEL", "preds/unet.h5", "a name that ends with .keras"),
        ("START", "nowhere.keras", "a file, or nothing"),
        ("PRECISION", "bfloat16", "one of ['auto', 'float32', 'mixed_bfloat16']"),
    ],
)
def test_a_wrong_parameter_stops_the_notebook_before_it_starts(root, name, value, wanted):
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}, wanted {wanted}")):
        run_from_the_top(**{name: value})
    assert not (root / "preds").exists()


def test_weights_without_a_scan_to_segment_are_refused_in_a_sentence(root):
    (root / "mine.keras").touch()
    save_patient(root / "raw/train")
    data.main(["--size", "32"])
    with pytest.raises(ValueError, match="nothing to segment: put scans in raw/test"):
        run_from_the_top(WEIGHTS="mine.keras")


def test_a_scan_named_as_a_picture_that_lies_in_preds_is_refused(root):
    for split, name in {"train": "p1", "test": "example"}.items():
        save_patient(root / "raw" / split, name)
    data.main(["--size", "32"])
    with pytest.raises(ValueError, match="a scan called example"):
        run_from_the_top()


def test_run_from_another_folder_the_notebook_says_where_to(root, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="run the notebook in its own folder"):
        run_from_the_top()


@pytest.mark.parametrize(("masks", "shown"), [([0, 0, 7, 0, 9, 0], 4), ([0] * 6, 1)])
def test_the_slice_that_is_shown_has_most_liver_or_is_the_middle_of_the_first_scan(
    notebook, masks, shown
):
    masks = np.arange(16) < np.reshape(masks, (6, 1, 1)) * np.ones((1, 4, 1))
    table = pd.DataFrame({"scan": list("aaabbb"), "slice": range(6)})
    names = vars(notebook) | {"train": data.Slices(np.zeros((6, 4, 16)), masks, table)}
    exec(find_code("def show("), names)
    notebook.plt.close("all")
    assert names["example"] == shown


def test_the_patients_with_the_fewest_slices_are_held_out_whole_or_those_named(notebook):
    slices = np.repeat(list("cabd"), [9, 5, 3, 5])  # the patient of each
    for share, held in {0: [], 0.01: ["b"], 0.25: ["b"], 0.5: ["a", "b"]}.items():
        assert notebook.hold_out(slices, share, []) == held
        assert notebook.hold_out(slices[::-1], share, []) == held
    assert notebook.hold_out(slices, 0.25, ["d", "c"]) == ["c", "d"]
    with pytest.raises(ValueError, match="leaves no training patient"):
        notebook.hold_out(["a"], 0.2, [])
    with pytest.raises(ValueError, match="names \\['x'\\]"):
        notebook.hold_out(["a", "b"], 0.2, ["x"])


class Draws:
    """Stands for a random generator: each draw is the next of the given places, 0 low to 1 high."""

    def __init__(self, *places):
        self.places = iter(places)

    def uniform(self, low, high, size=None):
        return low + np.asarray(next(self.places)) * (high - low)

    def integers(self, low, high, size, dtype):
        four = np.array([164, 164, 165, 165], dtype)  # they add up to 510 and one deviation, 148
        return np.broadcast_to(four[:, None, None], size)


SAME = dict(angle=0.5, zoom=0.5, shift=0.5, contrast=0.5, gamma=0.5, light=0.5, noise=0)


def moved(notebook, img, mask, **places):
    return notebook.augment(img, mask, Draws(*(SAME | places).values()))


def block(rows, columns, side=64):
    mask = np.zeros((side, side), np.uint8)
    mask[rows, columns] = 1
    return mask * np.uint8(200), mask


def test_in_the_middle_of_its_ranges_and_without_noise_augmentation_changes_nothing(notebook):
    img = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    mask = (img > 128).astype(np.uint8)
    new_img, new_mask = moved(notebook, img, mask)
    assert new_img.dtype == new_mask.dtype == np.uint8
    np.testing.assert_array_equal(new_img, img)
    np.testing.assert_array_equal(new_mask, mask)


def test_a_shift_moves_columns_and_rows_by_a_tenth_of_the_side(notebook):
    img, mask = block(slice(20, 30), slice(40, 50), side=60)
    new_img, new_mask = moved(notebook, img, mask, shift=(1.0, 0.0))  # columns, rows
    expected_img, expected_mask = block(slice(26, 36), slice(34, 44), side=60)
    np.testing.assert_array_equal(new_mask, expected_mask)
    np.testing.assert_array_equal(new_img, expected_img)


def test_a_turn_goes_around_the_middle(notebook):
    img, mask = block(slice(30, 35), slice(47, 52))  # its middle is 17.5 right, 0.5 below
    rows, columns = np.nonzero(moved(notebook, img, mask, angle=1.0)[1])
    turned = -np.deg2rad(30)  # a point 17.5 to the right of the middle goes up
    assert columns.mean() + 0.5 - 32 == pytest.approx(17.5 * np.cos(turned) + 0.25, abs=0.3)
    assert rows.mean() + 0.5 - 32 == pytest.approx(17.5 * np.sin(turned) + 0.43, abs=0.3)


def test_a_zoom_changes_the_sides_by_its_factor(notebook):
    img, mask = block(slice(12, 52), slice(12, 52))
    for place, zoom in {0.0: np.exp(0.36), 1.0: np.exp(-0.36)}.items():
        area = moved(notebook, img, mask, zoom=place)[1].sum()
        assert area**0.5 == pytest.approx(40 * zoom, abs=0.7)


def test_light_changes_the_grays_and_not_the_mask(notebook):
    img, mask = block(slice(22, 42), slice(22, 42))
    lighter, same = moved(notebook, img, mask, light=1.0)
    assert lighter[30, 30] == 225 and lighter[0, 0] == 25
    np.testing.assert_array_equal(same, mask)
    flatter, _ = moved(notebook, img, mask, contrast=0.0)  # exp(-0.25) = 0.7788
    assert flatter[30, 30] == 184 and flatter[0, 0] == 28
    darker, _ = moved(notebook, img, mask, gamma=1.0)  # exp(0.3) = 1.35, (200 / 255) ** 1.35
    assert darker[30, 30] == 184 and darker[0, 0] == 0


def test_noise_is_added_to_the_grays_and_not_to_the_mask(notebook):
    img, mask = block(slice(22, 42), slice(22, 42))
    noisy, same = moved(notebook, img, mask, noise=1.0)
    assert noisy[30, 30] == 215 and noisy[0, 0] == 15
    np.testing.assert_array_equal(same, mask)


def test_image_and_mask_move_together_and_are_never_mirrored(notebook):
    img, mask = block(slice(10, 50), slice(6, 26), side=64)
    for seed in range(30):
        new_img, new_mask = notebook.augment(img, mask, np.random.default_rng(seed))
        bright = new_img > (int(new_img.min()) + int(new_img.max())) / 2
        assert dice(bright, new_mask) > 0.97
        assert np.nonzero(new_mask)[1].mean() < 32  # by 3.3 columns or more: 16 x 0.87 x 0.7 - 6.4


@pytest.fixture
def arrays(tmp_path):
    """Return 7 memory-mapped slices of 16 x 16 pixels; slice n has gray value n."""
    for name, values in {"imgs": range(7), "masks": [0, 1] * 3 + [0]}.items():
        array = np.array(values, np.uint8).reshape(7, 1, 1) * np.ones((1, 16, 16), np.uint8)
        np.save(tmp_path / f"{name}.npy", array)
    return [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("imgs", "masks")]


def test_batches_hold_slices_in_order_with_their_masks(notebook, arrays):
    batches = notebook.Batches(*arrays, [5, 3, 1, 0, 2], batch_size=3)
    for _ in range(2):
        assert len(batches) == 2
        assert [batches[n][0][:, 0, 0, 0].tolist() for n in (0, 1)] == [[5, 3, 1], [0, 2]]
        assert batches[0][1].shape == (3, 16, 16, 1) and batches[0][1].all()
        batches.on_epoch_end()


def test_blank_slices_fill_a_batch_up_for_devices_that_share_it(notebook, arrays):
    batches = notebook.Batches(*arrays, [5, 3, 1, 0, 2], batch_size=3, devices=4)
    for n, numbers in enumerate([[5, 3, 1, 0], [0, 2, 0, 0]]):
        assert batches[n][0][:, 0, 0, 0].tolist() == numbers
    assert batches[0][1][:, 0, 0, 0].tolist() == [1, 1, 1, 2]  # which does not count
    assert batches[1][1][:, 0, 0, 0].tolist() == [0, 0, 2, 2]


def test_an_epoch_has_one_order_whatever_came_before(notebook, arrays):
    one, other = (notebook.Batches(*arrays, range(7), 3, 1) for _ in range(2))
    one.on_epoch_end(), one.on_epoch_end(), other.begin_epoch(3)
    assert one.order.tolist() == other.order.tolist() != [*range(7)]


def test_two_readers_of_batches_get_the_same_in_whatever_order_they_ask(notebook, arrays):
    one, other = (notebook.Batches(*arrays, range(7), 3, 1, notebook.augment) for _ in range(2))
    seen = []
    for _ in range(2):
        first = {n: one[n] for n in (2, 0, 1)}
        for n in range(3):
            for again, known in zip(other[n], first[n], strict=True):
                np.testing.assert_array_equal(again, known)
        seen.append(np.concatenate([first[n][0] for n in range(3)]))
        one.on_epoch_end(), other.on_epoch_end()
    assert (seen[0] != seen[1]).any()  # anew in each epoch
    assert (notebook.Batches(*arrays, range(7), 7, 2, notebook.augment)[0][0] != seen[0]).any()


def test_a_training_sees_each_slice_once_an_epoch_in_another_order(notebook, arrays):
    def image(y_true, y_pred):
        return y_pred[:, 0, 0, 0]

    def mask(y_true, y_pred):
        return ops.cast(y_true[:, 0, 0, 0], "float32")

    seen, epochs = [], 3  # what a network that changes nothing has seen, in the mean of an epoch
    same = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = keras.Sequential([keras.Input((16, 16, 1)), same])
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=[image, mask])
    batches = notebook.Batches(*arrays, range(7), 1, seed=0)
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append((logs["image"], logs["mask"]))
    )
    model.fit(batches, epochs=epochs, shuffle=False, verbose=0, callbacks=[watch])
    sums = np.array(seen, float).reshape(epochs, 7, 2) * np.arange(1, 8)[:, None]
    orders = np.rint(np.diff(sums, axis=1, prepend=0)).astype(int)
    np.testing.assert_array_equal(np.sort(orders[..., 0]), [range(7)] * epochs)
    np.testing.assert_array_equal(orders[..., 0] % 2, orders[..., 1])
    assert len(np.unique(orders[..., 0], axis=0)) == epochs


def dice_of(notebook, *batches):
    metric = notebook.Dice()
    for reference, predicted in batches:
        metric.update_state(np.array(reference, "float32"), np.array(predicted, "float32"))
    return float(metric.result())


def test_dice_is_known_on_masks_worked_out_by_hand(notebook):
    assert dice_of(notebook, ([1, 1, 0, 0], [1, 1, 0, 0])) == 1
    assert dice_of(notebook, ([1, 1, 0, 0], [0, 0, 1, 1])) == 0
    assert dice_of(notebook, ([1, 1, 1, 0], [0.9, 0.2, 0.5, 0.5])) == pytest.approx(2 * 2 / 6)
    assert dice_of(notebook, ([0, 0], [0.1, 0.4])) == 1
    assert dice_of(notebook, ([0, 0], [0.1, 0.6])) == 0
    batches = ([1] * 10, [1] * 10), ([1, 0], [0, 1])  # Dice 1 and 0 on their own
    assert dice_of(notebook, *batches) == pytest.approx(2 * 10 / (11 + 11))  # of all pixels


def test_the_dice_loss_is_known_on_masks_worked_out_by_hand(notebook):
    reference, predicted = np.array([[1.0, 0.0]], "float32"), np.array([[0.5, 0.5]], "float32")
    known = 1 - (2 * 0.5 + 1) / (1 + 1 + 1)
    assert float(notebook.dice_loss(reference, predicted)) == pytest.approx(known)
    empty = np.zeros((1, 2), "float32")
    assert float(notebook.dice_loss(empty, empty)) == 0


def test_cross_entropy_adds_its_mean_and_a_slope_out_of_finding_nothing(notebook):
    reference, predicted = np.array([[1.0, 0.0]], "float32"), np.array([[0.5, 0.5]], "float32")
    dice_loss = float(notebook.dice_loss(reference, predicted))
    total = float(notebook.dice_and_cross_entropy(reference, predicted))
    assert total == pytest.approx(dice_loss + np.log(2), abs=1e-5)
    liver = np.ones((1, 8, 8, 1), "float32")
    nearly_black = [float(notebook.dice_and_cross_entropy(liver, liver * p)) for p in (1e-4, 1e-3)]
    assert nearly_black[0] - nearly_black[1] > 1


def test_slices_that_fill_a_batch_up_count_neither_in_the_loss_nor_in_dice(notebook):
    reference = np.array([[[1.0, 0.0]], [[2.0, 2.0]]], "float32")  # the second one is blank
    predicted = np.array([[[0.9, 0.6]], [[0.7, 0.2]]], "float32")
    for loss in (notebook.dice_loss, notebook.dice_and_cross_entropy):
        assert float(loss(reference, predicted)) == float(loss(reference[:1], predicted[:1]))
    assert dice_of(notebook, (reference, predicted)) == pytest.approx(2 * 1 / (1 + 2))


def convolutions(network):
    return [layer for layer in network.layers if type(layer).__name__.startswith("Conv2D")]


def test_the_unet_is_the_tutorials(notebook):
    network = notebook.unet(256, 32, 0.0, 1.0)
    assert network.output_shape == (None, 256, 256, 1)
    up = ["Conv2DTranspose", "Conv2D", "Conv2D"]
    found = [type(layer).__name__ for layer in convolutions(network)]
    assert found == 5 * ["Conv2D", "Conv2D"] + 4 * up + ["Conv2D"]
    missing = sum(layer.filters for layer in convolutions(network) if not layer.use_bias)
    assert network.count_params() + missing == 7_759_521


def test_normalisation_is_inside_the_network(notebook):
    network = notebook.unet(16, 1, mean=50.0, deviation=20.0)
    slices = np.array([10, 50, 90], np.uint8).reshape(3, 1, 1, 1) * np.ones((1, 16, 16, 1), "uint8")
    normalised = keras.Model(network.input, network.layers[1].output)
    assert np.allclose(ops.convert_to_numpy(normalised(slices))[:, 0, 0, 0], [-2, 0, 2], atol=1e-5)


def norms(network):
    """Return for each convolution the norms of the weights that lead to each channel."""
    kernels = [ops.convert_to_numpy(layer.kernel) for layer in convolutions(network)]
    ins = [-1 if "Transpose" in type(layer).__name__ else -2 for layer in convolutions(network)]
    return [np.sqrt((k**2).sum(axis=(0, 1, axis))) for k, axis in zip(kernels, ins, strict=True)]


@pytest.mark.parametrize(("policy", "name"), [("float32", "Adam"), ("mixed_bfloat16", "Muon")])
def test_kernels_are_held_at_one_norm_in_training(notebook, policy, name):
    keras.utils.set_random_seed(0)
    network = notebook.unet(16, 2, 0.0, 1.0)
    notebook.compute_in(network, policy)
    known = 5 * [2**0.5, 2**0.5] + 4 * [1, 2**0.5, 2**0.5]
    last = norms(network)[-1]
    optimizer = (vars(keras.optimizers) | vars(notebook))[name]  # Keras has another Muon
    network.compile(optimizer(0.01), notebook.dice_loss)
    slices = np.random.default_rng(0).standard_normal((2, 16, 16, 1), np.float32)
    for _ in range(3):
        network.train_on_batch(slices, (slices > 0).astype(np.float32))
    for norm, wanted in zip(norms(network)[:-1], known, strict=True):
        assert np.allclose(norm, wanted, rtol=1e-5)
    assert not np.allclose(norms(network)[-1], last, rtol=1e-3)  # is free


def test_kernels_are_free_and_all_have_biases_without_normalize(notebook):
    network = notebook.unet(16, 2, 0.0, 1.0, normalize=False)
    assert all(layer.kernel.constraint is None for layer in convolutions(network))
    assert all(layer.use_bias for layer in convolutions(network))


def test_no_gradient_is_lost_in_bfloat16(notebook):
    if notebook.choose_precision("auto") == "float32":
        pytest.skip("it computes in float32 here, where bfloat16 loses gradients of biases")
    random = np.random.default_rng(0)
    slices = random.integers(0, 256, (8, 128, 128, 1), np.uint8)
    masks = (ndimage.gaussian_filter(slices.astype(np.float32), (0, 3, 3, 0)) > 128) * 1.0

    def gradients(policy):
        keras.utils.set_random_seed(0)
        network = notebook.unet(128, 8, 128.0, 64.0)
        for layer in convolutions(network):
            layer.kernel.constraint = None
        notebook.compute_in(network, policy)
        network.compile(keras.optimizers.SGD(1.0), notebook.dice_and_cross_entropy)
        before = network.get_weights()
        network.train_on_batch(slices, masks)
        return [a - b for a, b in zip(before, network.get_weights(), strict=True)]

    for exact, close in zip(gradients("float32"), gradients("mixed_bfloat16"), strict=True):
        assert np.linalg.norm(close - exact) < 0.3 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("7.5\n", "float32"),
        ("9.0\n8.6\n", "mixed_bfloat16"),
        ("9.0\n7.0\n", "float32"),
        ("sh: 1: nvidia-smi: not found", "float32"),
        ("[N/A]", "float32"),
    ],
)
def test_a_gpu_computes_in_bfloat16_from_compute_capability_8_on(
    notebook, monkeypatch, said, wanted
):
    monkeypatch.setattr(notebook.subprocess, "getoutput", lambda command: said)
    for name in ("cuda:0", "/job:localhost/device:GPU:0"):  # as PyTorch and TensorFlow say
        array = types.SimpleNamespace(device=name)
        monkeypatch.setattr(notebook, "ops", types.SimpleNamespace(zeros=lambda n, a=array: a))
        assert notebook.choose_precision("auto") == wanted


def test_precision_can_be_chosen_and_jax_computes_in_float32_on_a_cpu(notebook, monkeypatch):
    assert notebook.choose_precision("float32") == "float32"
    assert notebook.choose_precision("mixed_bfloat16") == "mixed_bfloat16"
    assert notebook.choose_precision("auto") in ("float32", "mixed_bfloat16")
    if "cpu" not in str(ops.zeros(1).device).lower():
        pytest.skip("needs a machine without a GPU")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert notebook.choose_precision("auto") == "float32"


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-3), ("bfloat16", 0.02)])
def test_orthogonalizing_keeps_directions_and_evens_out_strengths(notebook, dtype, close):
    random = np.random.default_rng(0)
    left = np.linalg.qr(random.standard_normal((36, 4)))[0]
    right = np.linalg.qr(random.standard_normal((4, 4)))[0]
    uneven = left * [100, 10, 1, 0.5] @ right.T
    even = notebook.orthogonalize(ops.convert_to_tensor(uneven, "float32"), dtype)
    assert keras.backend.standardize_dtype(even.dtype) == "float32"  # as weights are
    strengths = left.T @ ops.convert_to_numpy(even) @ right
    assert np.diag(strengths) == pytest.approx(1, abs=0.35)
    np.testing.assert_allclose(strengths, np.diag(np.diag(strengths)), atol=close)
    assert not ops.convert_to_numpy(notebook.orthogonalize(ops.zeros((6, 2)))).any()


def test_muon_moves_kernels_by_the_learning_rate_and_all_else_as_adam(notebook):
    random = np.random.default_rng(0)
    shapes = [(3, 3, 4, 8), (2, 2, 4, 8), (3, 3, 1, 8), (1, 1, 8, 1), (8,)]
    gradients = [random.standard_normal(shape).astype(np.float32) for shape in shapes]

    def steps(optimizer, strength):
        weights = [keras.Variable(np.zeros(shape, np.float32)) for shape in shapes]
        optimizer.apply([ops.convert_to_tensor(strength * g) for g in gradients], weights)
        return [ops.convert_to_numpy(weight.value) for weight in weights]

    muon, adam = steps(notebook.Muon(1e-2), 1), steps(keras.optimizers.Adam(1e-2), 1)
    for step, gradient in zip(muon[:2], gradients, strict=False):
        assert np.sqrt(np.mean(step**2)) == pytest.approx(1e-2, rel=0.35)
        assert np.sum(step * gradient) < 0
    for step, known in zip(muon[2:], adam[2:], strict=True):
        np.testing.assert_array_equal(step, known)
    for step, same in zip(steps(notebook.Muon(1e-2), 1000)[:2], muon, strict=False):
        np.testing.assert_allclose(step, same, rtol=1e-3, atol=1e-6)


def test_muon_remembers_earlier_gradients_and_looks_ahead(notebook):
    gradients = np.random.default_rng(0).standard_normal((3, 3, 3, 2, 4)).astype(np.float32)
    optimizer, kernel = notebook.Muon(1e-2), keras.Variable(np.zeros((3, 3, 2, 4), np.float32))
    momentum, known = 0, 0
    for gradient in gradients:
        optimizer.apply([ops.convert_to_tensor(gradient)], [kernel])
        momentum = 0.95 * momentum + gradient
        ahead = ops.convert_to_tensor((0.95 * momentum + gradient).reshape(18, 4))
        step = ops.convert_to_numpy(notebook.orthogonalize(ahead)).reshape(3, 3, 2, 4)
        known = known - 1e-2 * 18**0.5 * step
    np.testing.assert_allclose(ops.convert_to_numpy(kernel.value), known, rtol=1e-3, atol=1e-5)


def test_the_learning_rate_rises_and_falls_to_zero(notebook):
    rate = notebook.learning_rate(1e-3, 100)
    values = [float(rate(step)) for step in range(101)]
    assert values[0] == 0 and values[5] == pytest.approx(1e-3)  # a twentieth of the steps
    assert values[5 + 95 // 2 + 1] == pytest.approx(5e-4, rel=0.02)
    assert values[100] == pytest.approx(0, abs=1e-9)
    assert np.argmax(values) == 5 and (np.diff(values[5:]) < 0).all()
    assert notebook.learning_rate(1e-3, 100, decay=False) == 1e-3


def test_two_trainings_with_one_seed_give_the_same_dice(notebook, arrays):
    def train():
        keras.utils.set_random_seed(5)
        model = notebook.unet(16, 4, 3.0, 2.0)
        model.compile("adam", notebook.dice_loss, metrics=[notebook.Dice()])
        batches = notebook.Batches(*arrays, range(7), 2, 5, notebook.augment)
        return model.fit(batches, epochs=2, shuffle=False, verbose=0).history

    first, second = train(), train()
    np.testing.assert_allclose(first["dice"], second["dice"], atol=5e-4)
    np.testing.assert_allclose(first["loss"], second["loss"], atol=5e-4)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_the_kept_model_loads_without_custom_objects_and_predicts_the_same(
    notebook, tmp_path, policy
):
    imgs = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1), np.uint8)
    network = notebook.unet(16, 2, 128.0, 64.0)
    notebook.compute_in(network, policy)
    model = keras.Model(network.inputs, network.outputs)
    model.compile("adam", notebook.dice_loss, metrics=[notebook.Dice()])
    model.train_on_batch(imgs, imgs > 128)
    predicted = model.predict(imgs, verbose=0)
    assert network.layers[2].compute_dtype == policy.removeprefix("mixed_")
    assert predicted.dtype == np.float32 and predicted.min() >= 0 and predicted.max() <= 1
    path = tmp_path / "deeper" / "unet.keras"
    notebook.keep(network, path)
    loaded = keras.models.load_model(path)
    assert {layer.dtype_policy.name for layer in loaded.layers} == {"float32"}
    close = 1e-6 if policy == "float32" else 0.02
    np.testing.assert_allclose(ops.convert_to_numpy(loaded(imgs)), predicted, atol=close)
    assert [file.name for file in path.parent.iterdir()] == ["unet.keras"]


@pytest.fixture
def train(notebook, tmp_path, monkeypatch):
    """Return a function that runs the cell that trains, in a folder with an earlier model.

    losses : what Keras says of each epoch, or the error that breaks it off
    It returns after how many epochs the weights are that were kept: the bias of the network says.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "preds").mkdir()

    class OneBatch(list):
        def begin_epoch(self, epoch):
            pass

    def run_the_cell(losses, decay=True, watched="val_loss"):
        (tmp_path / "preds" / "unet.keras").write_bytes(b"trained all night")
        network = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model = keras.Model(network.inputs, network.outputs)
        model.compile("sgd", "mse")

        def fit(batches, callbacks, initial_epoch, **_):
            callbacks = keras.callbacks.CallbackList(callbacks, model=model)
            callbacks.on_train_begin()
            for epoch, loss in enumerate(losses):
                if epoch < initial_epoch:
                    continue
                network.layers[0].bias.assign([epoch + 1])
                if isinstance(loss, BaseException):
                    raise loss
                callbacks.on_epoch_end(epoch, {"loss": 0.5, watched: loss})

        model.fit = fit
        names = {"EPOCHS": 3, "DECAY": decay, "PRECISION": "float32", "WEIGHTS": ""}
        names |= {"MODEL": "preds/unet.keras", "model": model, "network": network}
        names["parameters"] = {name: names[name] for name in ("EPOCHS", "DECAY", "PRECISION")}
        names["parameters"]["START"], names["policy"] = "", "float32"
        names["batches"] = OneBatch([(np.ones((1, 1)), np.ones((1, 1)))])
        names["validation"] = ["batch"] if watched == "val_loss" else []
        names["train"] = data.Slices(np.zeros(3), np.zeros(3), None)
        names["train_numbers"] = names["validation_numbers"] = np.arange(3)
        exec(find_code("model.fit("), vars(notebook) | names)
        kept = keras.models.load_model("preds/unet.keras")
        (bias,) = model.get_weights()[-1].tolist()
        assert kept.get_weights()[-1].tolist() == [bias]  # what is predicted is what is kept
        return bias

    return run_the_cell


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("watched", ["val_loss", "loss"])  # with and without validation patients
@pytest.mark.parametrize(
    ("losses", "with_decay", "without"),
    [
        ([0.5, 0.3, 0.4], 3, 2),  # the last epoch, or the lowest loss
        ([0.5, 0.3, NAN], 2, 2),
        ([0.5, 0.3, KeyboardInterrupt()], 2, 2),  # the user stops the cell
        ([NAN, 0.3, 0.4], 3, 2),
    ],
)
def test_the_last_epoch_is_kept_or_the_lowest_loss_and_an_earlier_model_is_renamed(
    train, losses, with_decay, without, watched, tmp_path
):
    assert train(losses, True, watched) == with_decay
    (renamed,) = (tmp_path / "preds").glob("unet-2*.keras")
    assert renamed.read_bytes() == b"trained all night"
    stopped = isinstance(losses[-1], KeyboardInterrupt)
    assert (tmp_path / "preds" / "training.npz").exists() == stopped  # and goes on if run again
    assert train(losses, False, watched) == without


@pytest.mark.parametrize("loss", [NAN, INF, KeyboardInterrupt()])
def test_a_training_without_a_finite_loss_leaves_an_earlier_model_as_it_is(train, loss, tmp_path):
    with pytest.raises(RuntimeError, match="no model is kept: train again"):
        train([loss])
    (model,) = (tmp_path / "preds").glob("*.keras")
    assert model.name == "unet.keras" and model.read_bytes() == b"trained all night"


def test_predictions_stay_in_line_with_their_slices(notebook, arrays, tmp_path):
    class Echo:
        """Stands for a network: predicts the gray value divided by ten."""

        def predict(self, imgs, batch_size, verbose):
            return imgs / 10

    patients = {"a": np.array([4, 5, 6]), "b": np.array([0, 1, 2, 3])}
    probabilities = notebook.predict_slices(Echo(), arrays[0], patients, 2, tmp_path / "p.npy")
    np.testing.assert_allclose(probabilities[:, 0, 0], np.arange(7) / 10, atol=1e-3)
    assert isinstance(probabilities, np.memmap)


def colours(picture):
    return {tuple(colour) for colour in picture.reshape(-1, 3)}


def test_a_probability_of_09_is_outlined_and_not_cast_to_black(notebook):
    img, probability = np.full((32, 32), 128, np.uint8), np.zeros((32, 32), np.float16)
    probability[4:12, 2:10] = 0.9
    picture = notebook.overlay(img, probability)
    assert picture.shape == (512, 512, 3) and picture.dtype == np.uint8
    rows, columns = np.nonzero((picture == YELLOW).all(axis=-1))
    assert 60 < rows.min() < 70 and 185 < rows.max() < 197  # rows 4 to 12, 16 times larger
    assert 28 < columns.min() < 38 and 153 < columns.max() < 165
    assert YELLOW not in colours(notebook.overlay(img, probability * 0.5))


def test_the_reference_is_a_thin_line_of_a_second_colour(notebook):
    img, mask = np.full((32, 32), 128, np.uint8), np.zeros((32, 32), np.uint8)
    mask[4:12, 2:10] = 1
    picture = notebook.overlay(img, mask * np.float16(0.9), mask)
    assert {YELLOW, CYAN} <= colours(picture)
    assert (picture == CYAN).all(axis=-1).sum() < (picture == YELLOW).all(axis=-1).sum() * 1.5
    assert CYAN not in colours(notebook.overlay(img, mask, None))


def test_a_scan_gets_a_picture_a_slice_in_the_order_of_position(notebook, tmp_path, arrays):
    imgs, masks = arrays
    part = data.Slices(imgs, masks, pd.DataFrame({"slice": [6, 5, 4, 3, 2, 1, 0], "mask": "m"}))
    (tmp_path / "p.1").mkdir()
    (tmp_path / "p.1" / "slice_0099.png").write_bytes(b"of an earlier scan")
    sheet = notebook.draw_slices(tmp_path / "p.1", part, masks * 0.9, np.arange(7))
    names = sorted(path.name for path in (tmp_path / "p.1").iterdir())
    assert names == [f"slice_{n:04d}.png" for n in range(7)]
    assert imread(tmp_path / "p.1" / names[0]).shape == (512, 512, 3)
    assert imread(tmp_path / "p.1.png").shape == sheet.shape == (2 * 256, 6 * 256, 3)


def test_the_best_and_the_worst_scan_are_shown_as_what_they_are(notebook):
    masks = np.zeros((4, 16, 16), np.uint8)
    masks[3, :4], masks[1, :8] = 1, 1  # missed
    slices = pd.DataFrame({"slice": [7, 8, 5, 6]})
    names = dict(
        scores=pd.DataFrame({"scan": ["a", "b", "c"], "dice": [0.5, 0.9, np.nan]}),
        scans={"a": np.array([0, 1]), "b": np.array([2, 3])},
        test=data.Slices(np.zeros((4, 16, 16), np.uint8), masks, slices),
        probabilities=np.zeros((4, 16, 16), np.float16),
    )
    notebook.plt.close("all")
    exec(find_code("def worst_slice("), vars(notebook) | names)
    titles = [notebook.plt.figure(n).axes[0].get_title() for n in notebook.plt.get_fignums()]
    notebook.plt.close("all")
    assert titles == ["best scan: b, slice 6", "worst scan: a, slice 8"]


def small_model(seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.1), "mse")
    return model


def fit(notebook, path, epochs, asked=None, seed=0):
    """Train a small model until an epoch, or go on; return its weights and the epochs done before.

    path : where it keeps its progress
    """
    model = small_model(seed)
    progress = notebook.Progress(model, path, asked or {"LEARNING_RATE": 0.1}, "loss")
    done = progress.resume()
    x = np.random.default_rng(0).standard_normal((20, 2), np.float32)
    options = {"initial_epoch": done, "shuffle": False, "verbose": 0, "callbacks": [progress]}
    model.fit(x, x[:, :1], epochs=epochs, **options)
    return model.get_weights(), done, progress


def test_a_training_that_goes_on_ends_as_one_that_was_never_stopped(notebook, tmp_path):
    whole, _, known = fit(notebook, tmp_path / "whole.npz", 4)
    assert fit(notebook, tmp_path / "part.npz", 2)[1] == 0
    weights, done, progress = fit(notebook, tmp_path / "part.npz", 4, seed=7)
    assert done == 2 and progress.history == known.history
    for pair in [*zip(weights, whole, strict=True), *zip(progress.best, known.best, strict=True)]:
        np.testing.assert_array_equal(*pair)


def test_a_training_goes_on_only_if_all_that_decides_on_it_is_the_same(notebook, tmp_path, capsys):
    fit(notebook, tmp_path / "p.npz", 1, {"LEARNING_RATE": 0.1, "slices": [1, 2]})
    assert fit(notebook, tmp_path / "p.npz", 1, {"LEARNING_RATE": 0.2, "slices": [1, 3]})[1] == 0
    assert "is of one with other LEARNING_RATE, slices" in capsys.readouterr().out


def test_slices_parameters_the_model_to_start_from_and_code_decide(tmp_path, notebook):
    (tmp_path / "start.keras").write_bytes(b"1")
    parameters = {"EPOCHS": 3, "START": str(tmp_path / "start.keras"), "PRECISION": "float32"}
    parameters |= {"MODEL": "a.keras", "SMOOTH_MM": 5, "WEIGHTS": ""}
    arrays = [np.zeros((2, 3, 3), np.uint8), np.arange(2)]

    def changed():
        asked = notebook.describe(parameters, arrays, [notebook.augment])
        return {name for name in known if asked[name] != known[name]}

    known = notebook.describe(parameters, arrays, [notebook.augment])
    parameters |= {"MODEL": "b.keras", "SMOOTH_MM": 0}
    assert changed() == set()
    parameters["EPOCHS"] = 4
    assert changed() == {"EPOCHS"}
    arrays[0][1, 2, 2] = 1
    assert changed() == {"EPOCHS", "slices"}
    (tmp_path / "start.keras").write_bytes(b"2")
    assert changed() == {"EPOCHS", "slices", "START"}
    known = notebook.describe(parameters, arrays, [notebook.unet])  # of another cell
    assert notebook.describe(parameters, arrays, [notebook.augment])["code"] != known["code"]


def test_a_full_disk_is_an_error_before_the_first_epoch(notebook, tmp_path, monkeypatch):
    free = types.SimpleNamespace(free=100)
    monkeypatch.setattr(notebook.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(OSError, match="has 0.00 GB free, wanted"):
        fit(notebook, tmp_path / "p.npz", 1)


@pytest.mark.parametrize("size", [32, 16])
def test_a_training_starts_with_a_kept_models_weights_and_grays(notebook, tmp_path, size):
    kept = notebook.unet(32, 2, 50.0, 20.0)
    kept.save(tmp_path / "kept.keras")
    network = notebook.begin_with(str(tmp_path / "kept.keras"), notebook.unet(size, 2, 1.0, 2.0))
    assert network.input_shape == (None, size, size, 1)
    imgs = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), np.uint8)
    if size == 32:
        np.testing.assert_array_equal(*(ops.convert_to_numpy(n(imgs)) for n in (network, kept)))
    for one, other in zip(network.get_weights(), kept.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert convolutions(network)[0].kernel.constraint is not None


@pytest.mark.parametrize("options", [{"filters": 4}, {"filters": 2, "normalize": False}])
def test_a_model_with_other_filters_or_layers_is_no_start(notebook, tmp_path, options):
    notebook.unet(16, 2, 50.0, 20.0).save(tmp_path / "kept.keras")
    wanted = notebook.unet(16, mean=1.0, deviation=2.0, **options)
    sentence = f"kept.keras' has 2 filters, wanted {options['filters']} and the same NORMALIZE: set"
    with pytest.raises(ValueError, match=sentence):
        notebook.begin_with(str(tmp_path / "kept.keras"), wanted)
