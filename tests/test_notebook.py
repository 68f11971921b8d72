"""The form of train.ipynb and its functions, taken from the notebook without copying them."""

import ast
import json
import shutil
import subprocess

import evaluate
import keras
import numpy as np
import pandas as pd
import pytest
from conftest import REPO
from keras import ops
from scipy import ndimage
from skimage.io import imread

import data

YELLOW, CYAN = (255, 255, 0), (0, 255, 255)


def cells(text=None):
    return json.loads(text or (REPO / "train.ipynb").read_text(encoding="utf-8"))["cells"]


def code(cell):
    return "".join(cell["source"])


def committed_cells():
    """Return the cells as committed, whatever the user has changed or run since."""
    if not shutil.which("git"):
        pytest.skip("needs git to see what is committed")
    shown = subprocess.run(["git", "show", ":train.ipynb"], cwd=REPO, capture_output=True)
    if shown.returncode:
        pytest.skip("needs the git repository to see what is committed")
    return cells(shown.stdout.decode())


def test_what_is_committed_has_no_outputs_and_no_execution_counts():
    for cell in committed_cells():
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_there_is_one_parameters_cell_and_it_holds_literals_in_capitals():
    tagged = [c for c in cells() if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for statement in ast.parse(code(tagged[0])).body:
        assert isinstance(statement, ast.Assign) and statement.targets[0].id.isupper()
        ast.literal_eval(statement.value)


def test_the_defaults_are_the_tutorials_where_nothing_better_was_measured():
    tagged = next(c for c in committed_cells() if "parameters" in c["metadata"].get("tags", []))
    values = {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse(code(tagged)).body}
    assert values["EPOCHS"] == 20
    assert values["LEARNING_RATE"] == 1e-3
    assert values["FILTERS"] == 32
    assert values["BATCH_SIZE"] == 10
    assert values["SMALL_SHARE"] == 0 and values["SMOOTH_MM"] == 5  # the tutorial has neither
    assert values["VALIDATION_SHARE"] == 0.1  # of the patients; the tutorial's 0.2 of the slices


def test_all_imports_stand_in_the_first_code_cell_and_there_are_no_magics():
    first, *others = [code(c) for c in cells() if c["cell_type"] == "code"]
    assert "import keras" in first
    for text in others:
        tree = ast.parse(text)  # a magic would be no Python
        assert not any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree))


def test_no_backend_is_called_but_keras():
    for cell in cells():
        if cell["cell_type"] == "code":
            assert not {"tf", "tensorflow", "torch", "jax"} & {
                node.id for node in ast.walk(ast.parse(code(cell))) if isinstance(node, ast.Name)
            }


def kinds(network):
    return [type(layer).__name__ for layer in network.layers]


@pytest.mark.parametrize("normalize", [True, False])
def test_the_unet_is_the_tutorials(notebook, normalize):
    network = notebook.unet(256, 32, 0.0, 1.0, normalize)
    biases = 256 + 128 + 64 + 32  # of the transposed convolutions
    assert network.count_params() == 7_759_521 - (biases if normalize else 0)
    assert network.output_shape == (None, 256, 256, 1)
    convolutions = [kind for kind in kinds(network) if kind.startswith("Conv2D")]
    up = ["Conv2DTranspose", "Conv2D", "Conv2D"]
    assert convolutions == 5 * ["Conv2D", "Conv2D"] + 4 * up + ["Conv2D"]


def norms(network):
    """Return for each convolution the norms of the weights that lead to each channel."""
    layers = [layer for layer in network.layers if type(layer).__name__.startswith("Conv2D")]
    kernels = [ops.convert_to_numpy(layer.kernel) for layer in layers]  # (height, width, in, out)
    ins = [-1 if "Transpose" in type(layer).__name__ else -2 for layer in layers]  # or out, in
    return [np.sqrt((k**2).sum(axis=(0, 1, axis))) for k, axis in zip(kernels, ins, strict=True)]


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("muon", [True, False])
def test_kernels_are_held_at_one_norm_in_training(notebook, policy, muon):
    keras.utils.set_random_seed(0)
    network = notebook.in_precision(notebook.unet(16, 2, 0.0, 1.0), policy)
    known = 5 * [2**0.5, 2**0.5] + 4 * [1, 2**0.5, 2**0.5]
    last = norms(network)[-1]
    optimizer = notebook.Muon(0.01) if muon else keras.optimizers.Adam(0.01)
    network.compile(optimizer, notebook.dice_and_cross_entropy)
    random = np.random.default_rng(0)
    slices = random.standard_normal((2, 16, 16, 1), np.float32)
    for _ in range(3):
        network.train_on_batch(slices, (slices > 0).astype(np.float32))
    for norm, wanted in zip(norms(network)[:-1], known, strict=True):
        assert np.allclose(norm, wanted, rtol=1e-5)
    assert not np.allclose(norms(network)[-1], last, rtol=1e-3)  # is free


def test_no_gradient_is_lost_in_bfloat16(notebook):
    if notebook.choose_precision("auto") == "float32":
        pytest.skip("it computes in float32 here, where bfloat16 loses gradients of biases")
    random = np.random.default_rng(0)
    slices = random.integers(0, 256, (8, 128, 128, 1), np.uint8)
    masks = (ndimage.gaussian_filter(slices.astype(np.float32), (0, 3, 3, 0)) > 128) * 1.0

    def gradients(policy):
        keras.utils.set_random_seed(0)
        network = notebook.unet(128, 8, 128.0, 64.0)
        for layer in network.layers:
            layer.kernel_constraint = None
        model = notebook.in_precision(network, policy)
        model.compile(keras.optimizers.SGD(1.0), notebook.dice_and_cross_entropy)
        before = model.get_weights()
        model.train_on_batch(slices, masks)
        return [a - b for a, b in zip(before, model.get_weights(), strict=True)]

    for exact, close in zip(gradients("float32"), gradients("mixed_bfloat16"), strict=True):
        assert np.linalg.norm(close - exact) < 0.3 * np.linalg.norm(exact)


def test_kernels_are_free_without_normalize(notebook):
    network = notebook.unet(16, 2, 0.0, 1.0, normalize=False)
    assert all(getattr(layer, "kernel_constraint", None) is None for layer in network.layers)


def test_normalisation_is_inside_the_network(notebook):
    network = notebook.unet(16, 1, mean=50.0, deviation=20.0)
    slices = np.array([10, 50, 90], np.uint8).reshape(3, 1, 1, 1) * np.ones((1, 16, 16, 1), "uint8")
    normalised = keras.Model(network.inputs, network.layers[1].output)
    assert np.allclose(ops.convert_to_numpy(normalised(slices))[:, 0, 0, 0], [-2, 0, 2], atol=1e-5)


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


def test_dice_pools_the_epoch_and_is_no_mean_of_batches(notebook):
    batches = ([1] * 10, [1] * 10), ([1, 0], [0, 1])  # Dice 1 and 0 on their own
    assert dice_of(notebook, *batches) == pytest.approx(2 * 10 / (11 + 11))


def test_dice_of_volumes_is_known_by_hand(notebook):
    reference, predicted = np.zeros((2, 3, 4), bool), np.zeros((2, 3, 4), np.uint8)
    assert notebook.dice_score(reference, predicted) == 1
    reference[0, 0] = True
    assert notebook.dice_score(reference, predicted) == 0
    predicted[0, 0, :2] = 1
    assert notebook.dice_score(reference, predicted) == pytest.approx(2 * 2 / (4 + 2))


def test_the_loss_is_smoothed_dice_plus_cross_entropy(notebook):
    reference, predicted = np.array([[1.0, 0.0]], "float32"), np.array([[0.5, 0.5]], "float32")
    dice_loss = 1 - (2 * 0.5 + 1) / (1 + 1 + 1)
    assert float(notebook.dice_loss(reference, predicted)) == pytest.approx(dice_loss)
    total = float(notebook.dice_and_cross_entropy(reference, predicted))
    assert total == pytest.approx(dice_loss + np.log(2), abs=1e-5)
    empty = np.zeros((1, 2), "float32")
    assert float(notebook.dice_loss(empty, empty)) == 0


def test_the_loss_of_finding_nothing_has_a_slope_out_of_it(notebook):
    reference = np.ones((1, 8, 8, 1), "float32")
    nearly_black = [
        float(notebook.dice_and_cross_entropy(reference, reference * p)) for p in (1e-4, 1e-3)
    ]
    assert nearly_black[0] - nearly_black[1] > 1


def test_the_patients_with_the_fewest_slices_are_held_out_whole(notebook):
    slices = np.repeat(list("cabd"), [9, 5, 3, 5])  # the patient of each
    for share, held in {0: [], 0.01: ["b"], 0.25: ["b"], 0.5: ["a", "b"]}.items():
        assert notebook.hold_out(slices, share, []) == held
        assert notebook.hold_out(slices[::-1], share, []) == held
    assert notebook.hold_out(slices, 0.25, ["d", "c"]) == ["c", "d"]


def test_a_hold_out_that_cannot_be_is_refused(notebook):
    with pytest.raises(ValueError, match="leaves none to train on"):
        notebook.hold_out(["a"], 0.2, [])
    with pytest.raises(ValueError, match="names \\['x'\\]"):
        notebook.hold_out(["a", "b"], 0.2, ["x"])


@pytest.fixture
def arrays(tmp_path):
    """Return 7 memory-mapped slices of 16 x 16 pixels; slice n has gray value n."""
    for name, values in {"imgs": range(7), "masks": [0, 1] * 3 + [0]}.items():
        array = np.array(values, np.uint8).reshape(7, 1, 1) * np.ones((1, 16, 16), np.uint8)
        np.save(tmp_path / f"{name}.npy", array)
    return [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("imgs", "masks")]


def test_batches_hold_each_slice_once_with_its_own_mask(notebook, arrays):
    batches = notebook.Batches(*arrays, range(7), batch_size=3, seed=0)
    assert [len(batches[n][0]) for n in range(len(batches))] == [3, 3, 1]
    for _ in range(2):
        imgs = np.concatenate([batches[n][0] for n in range(3)])
        masks = np.concatenate([batches[n][1] for n in range(3)])
        assert sorted(imgs[:, 0, 0, 0]) == list(range(7))
        np.testing.assert_array_equal(imgs % 2, masks)
        batches.on_epoch_end()
    assert imgs.shape == (7, 16, 16, 1)


def test_batches_without_masks_hold_images_alone(notebook, arrays):
    (imgs,) = notebook.Batches(arrays[0], None, range(7), batch_size=3)[1]
    assert imgs[:, 0, 0, 0].tolist() == [3, 4, 5]


def test_batches_are_shuffled_alike_by_one_seed_and_not_without(notebook, arrays):
    def order(seed):
        return notebook.Batches(*arrays, range(7), 7, seed)[0][0][:, 0, 0, 0].tolist()

    assert order(None) == list(range(7))
    assert order(3) == order(3) != order(4)


def test_after_an_epoch_that_was_broken_off_the_next_one_is_whole(notebook, arrays):
    whole, broken_off = (notebook.Batches(*arrays, range(7), 3, seed=0) for _ in range(2))
    epochs = []
    for batches, count in ((whole, 3), (broken_off, 1)):
        for n in range(count):
            batches[n]
        batches.on_epoch_end()
        epochs.append(np.concatenate([batches[n][0] for n in range(3)])[:, 0, 0, 0].tolist())
    assert epochs[0] == epochs[1] and sorted(epochs[0]) == list(range(7))


def test_what_goes_wrong_while_a_batch_is_read_ahead_is_raised_when_it_is_wanted(notebook, arrays):
    def fail(img, mask, random):
        raise OSError("the disk is gone")

    batches = notebook.Batches(*arrays, range(7), 3, seed=0, augment=fail)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            batches[0]
    batches.augment = None  # and when it goes well again, that counts
    assert [len(batches[n][0]) for n in range(3)] == [3, 3, 1]


def test_the_next_epoch_is_read_before_the_one_before_it_ends_and_once(notebook, arrays):
    asked = []

    class Counted(notebook.Batches):
        def read(self, epoch, index, side):
            asked.append((epoch, index))
            return super().read(epoch, index, side)

    batches = Counted(*arrays, range(7), 3, seed=0)
    for _ in range(2):
        for n in range(3):
            batches[n]
        batches.on_epoch_end()
    assert all(future.result() for future in batches.coming.values())
    ahead = 3 + 2 + 16  # batches of the first epoch, and to the sixteenth from the second's last on
    assert sorted(asked) == [(1 + n // 3, n % 3) for n in range(ahead)]


def test_batches_that_never_change_are_not_read_again_for_the_next_epoch(notebook, arrays):
    batches = notebook.Batches(*arrays, range(7), 3)
    batches[0], batches[1]
    first = batches.coming[0, 0, 16]
    for _ in range(2):  # as often as Keras likes
        batches.on_epoch_end()
    assert batches.coming[0, 0, 16] is first
    assert sorted(batches.coming) == [(0, 0, 16), (0, 2, 16)]  # the second is read when wanted


def test_what_an_epoch_that_was_broken_off_left_is_let_go(notebook, arrays):
    batches = notebook.Batches(*arrays, range(7), 3, seed=0)
    batches[0]
    batches.on_epoch_end()
    assert min(epoch for epoch, _, _ in batches.coming) == 2


def test_small_batches_are_the_same_slices_at_half_the_size(notebook):
    img, mask = np.zeros((1, 32, 32), np.uint8), np.zeros((1, 32, 32), np.uint8)
    img[0, 8:16, 4:12], mask[0, 8:16, 4:12] = 200, 1
    batches = notebook.Batches(img, mask, [0], 1)
    batches.side = 16
    imgs, masks = batches[0]
    assert imgs.shape == masks.shape == (1, 16, 16, 1)
    assert imgs.dtype == masks.dtype == np.uint8
    expected = np.zeros((16, 16))
    expected[4:8, 2:6] = 1
    np.testing.assert_array_equal(masks[0, ..., 0], expected)
    assert imgs[0, 5, 3, 0] == 200 and imgs[0, 12, 12, 0] == 0
    batches.side = 32
    np.testing.assert_array_equal(batches[0][0][0, ..., 0], img[0])


def test_a_parameter_out_of_its_range_is_refused_in_a_sentence(notebook):
    notebook.check_range("SMALL_SHARE", 0, 0, 1)
    notebook.check_range("SMALL_SHARE", 0.99, 0, 1)
    notebook.check_range("EPOCHS", 1000, 1)
    with pytest.raises(ValueError, match="SMALL_SHARE is 50, wanted 0 or more and less than 1$"):
        notebook.check_range("SMALL_SHARE", 50, 0, 1)  # would train 50 times the epochs
    with pytest.raises(ValueError, match="SMALL_SHARE is 1, wanted 0 or more and less than 1$"):
        notebook.check_range("SMALL_SHARE", 1, 0, 1)  # would never train on whole slices
    with pytest.raises(ValueError, match="EPOCHS is 0, wanted 1 or more$"):
        notebook.check_range("EPOCHS", 0, 1)
    with pytest.raises(ValueError, match="SMOOTH_MM is nan, wanted 0 or more$"):
        notebook.check_range("SMOOTH_MM", np.nan, 0)


def test_a_parameter_of_another_type_is_refused_in_a_sentence(notebook):
    notebook.check_kind("MUON", False, bool, "True or False")
    with pytest.raises(ValueError, match="MUON is 'false', wanted True or False$"):
        notebook.check_kind("MUON", "false", bool, "True or False")  # would count as True
    with pytest.raises(ValueError, match="VIEWS is 1.5, wanted a whole number$"):
        notebook.check_kind("VIEWS", 1.5, int, "a whole number")


def test_a_training_goes_from_half_the_size_to_the_whole(notebook):
    assert notebook.stages(256, 20, 0.5) == [(128, 0, 10), (256, 10, 20)]
    assert notebook.stages(128, 15, 0.5) == [(64, 0, 7), (128, 7, 15)]
    assert notebook.stages(48, 2, 0.5) == [(16, 0, 1), (48, 1, 2)]  # four poolings want 16
    assert notebook.stages(16, 2, 0.5) == [(16, 0, 1), (16, 1, 2)]
    assert notebook.stages(256, 1, 0.5) == [(256, 0, 1)]
    assert notebook.stages(256, 20, 0) == [(256, 0, 20)]


def test_the_training_copy_takes_slices_of_any_size_and_the_kept_network_one(notebook):
    network = notebook.unet(32, 2, 128.0, 64.0)
    twin = notebook.in_precision(network, "float32")
    for side in (16, 32):
        assert twin(np.zeros((1, side, side, 1), np.uint8)).shape == (1, side, side, 1)
    assert network.input_shape == (None, 32, 32, 1)


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
    noisy, same = moved(notebook, img, mask, noise=1.0)
    assert noisy[30, 30] == 215 and noisy[0, 0] == 15
    np.testing.assert_array_equal(same, mask)


def test_image_and_mask_move_together_and_are_never_mirrored(notebook):
    img, mask = block(slice(10, 50), slice(6, 26), side=64)
    for seed in range(30):
        new_img, new_mask = notebook.augment(img, mask, np.random.default_rng(seed))
        bright = new_img > (int(new_img.min()) + int(new_img.max())) / 2
        assert notebook.dice_score(bright, new_mask) > 0.97
        assert np.nonzero(new_mask)[1].mean() < 32  # by 3.3 columns or more: 16 x 0.87 x 0.7 - 6.4


def test_augmented_batches_differ_by_epoch_and_not_by_run(notebook, arrays):
    def epochs(seed):
        pieces = np.arange(7 * 16 * 16, dtype=np.uint8).reshape(7, 16, 16)
        batches = notebook.Batches(pieces, arrays[1], range(7), 7, seed, notebook.augment)
        first = np.array(batches[0][0])
        batches.on_epoch_end()
        return first, np.array(batches[0][0])

    first, second = epochs(1)
    assert np.sort(first.sum(axis=(1, 2, 3))).tolist() != np.sort(second.sum((1, 2, 3))).tolist()
    for again, once in zip(epochs(1), (first, second), strict=True):
        np.testing.assert_array_equal(again, once)
    assert (epochs(2)[0] != first).any()


def test_the_learning_rate_rises_and_falls_to_zero(notebook):
    rate = notebook.learning_rate(1e-3, 100)
    values = [float(rate(step)) for step in range(101)]
    assert values[0] == 0 and values[5] == pytest.approx(1e-3)  # a twentieth of the steps
    assert values[5 + 95 // 2 + 1] == pytest.approx(5e-4, rel=0.02)
    assert values[100] == pytest.approx(0, abs=1e-9)
    assert np.argmax(values) == 5 and (np.diff(values[5:]) < 0).all()
    assert notebook.learning_rate(1e-3, 100, decay=False) == 1e-3


@pytest.mark.parametrize("dtype, close", [("float32", 1e-3), ("bfloat16", 0.02)])
def test_orthogonalizing_keeps_directions_and_evens_out_strengths(notebook, dtype, close):
    random = np.random.default_rng(0)
    left = np.linalg.qr(random.standard_normal((36, 4)))[0]
    right = np.linalg.qr(random.standard_normal((4, 4)))[0]
    uneven = left * [100, 10, 1, 0.5] @ right.T
    even = notebook.orthogonalize(ops.convert_to_tensor(uneven, "float32"), dtype)
    assert keras.backend.standardize_dtype(even.dtype) == "float32"  # as weights are
    even = ops.convert_to_numpy(even)
    strengths = left.T @ even @ right
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


def test_gray_values_are_counted_inside_and_outside(notebook, arrays):
    counts = notebook.count_grays(*arrays, [0, 1, 3])
    assert counts.shape == (2, 256)
    assert counts[0, 0] == 256 and counts[1, 1] == 256 and counts[1, 3] == 256
    assert counts.sum() == 3 * 256


@pytest.fixture(scope="module")
def trained(notebook, tmp_path_factory):
    """Return the path of a model that two epochs of training kept, and the training model."""
    path = tmp_path_factory.mktemp("model") / "deeper" / "unet.keras"
    imgs = np.random.default_rng(0).integers(0, 256, (4, 16, 16), np.uint8)
    batches = notebook.Batches(imgs, (imgs > 128).astype(np.uint8), range(4), 2, 0)
    network = notebook.unet(16, 2, 128.0, 64.0)
    model = notebook.in_precision(network, "mixed_bfloat16")
    model.compile("adam", notebook.dice_and_cross_entropy, metrics=[notebook.Dice()])
    keep = notebook.KeepWeights(network, path, 2)
    model.fit(batches, validation_data=batches, epochs=2, verbose=0, callbacks=[keep])
    return path, network


def test_the_kept_model_loads_without_custom_objects_and_takes_uint8_slices(trained):
    path, network = trained
    loaded = keras.models.load_model(path)
    slices = np.full((1, 16, 16, 1), 200, np.uint8)
    probabilities = ops.convert_to_numpy(loaded(slices))
    np.testing.assert_allclose(probabilities, ops.convert_to_numpy(network(slices)), atol=1e-6)
    assert probabilities.min() >= 0 and probabilities.max() <= 1
    assert {layer.dtype_policy.name for layer in loaded.layers} == {"float32"}
    assert [file.name for file in path.parent.iterdir()] == ["unet.keras"]


@pytest.mark.parametrize("keep_last", [True, False])
def test_the_validation_dice_of_the_kept_epoch_is_that_of_its_model(notebook, tmp_path, keep_last):
    imgs = np.random.default_rng(0).integers(0, 256, (8, 16, 16), np.uint8)
    masks = (imgs > 128).astype(np.uint8)
    training = notebook.Batches(imgs, masks, range(4), 2, 0, notebook.augment)
    validation = notebook.Batches(imgs, masks, range(4, 8), 2)
    model = notebook.unet(16, 4, 128.0, 64.0)
    model.compile("adam", notebook.dice_and_cross_entropy, metrics=[notebook.Dice()])
    network = notebook.unet(16, 4, 128.0, 64.0)
    keep = notebook.KeepWeights(network, tmp_path / "unet.keras", 4, keep_last)
    fitted = model.fit(training, validation_data=validation, epochs=4, verbose=0, callbacks=[keep])
    loaded = keras.models.load_model(tmp_path / "unet.keras")
    predicted = loaded.predict(imgs[4:, ..., None], verbose=0)[..., 0] >= 0.5
    kept = -1 if keep_last else np.argmin(fitted.history["val_loss"])
    known = fitted.history["val_dice"][kept]
    assert notebook.dice_score(masks[4:], predicted) == pytest.approx(known, abs=1e-3)


@pytest.mark.parametrize("figure", ["val_loss", "loss"])  # with and without validation patients
def test_a_last_epoch_whose_loss_is_no_number_replaces_nothing(notebook, tmp_path, figure):
    network = notebook.unet(16, 1, 128.0, 64.0)
    keep = notebook.KeepWeights(network, tmp_path / "unet.keras", 2, keep_last=True)
    keep.set_model(network)
    keep.on_epoch_begin(0)
    keep.on_epoch_end(0, {figure: 0.5})
    kept = (tmp_path / "unet.keras").read_bytes()
    keep.on_epoch_end(1, {figure: float("nan")})
    assert (tmp_path / "unet.keras").read_bytes() == kept


def test_without_validation_patients_the_latest_epoch_is_kept(notebook, tmp_path, capsys):
    keep = notebook.KeepWeights(notebook.unet(16, 1, 128.0, 64.0), tmp_path / "unet.keras", 3)
    keep.set_model(keep.network)
    keep.on_epoch_begin(0)
    for epoch, loss in enumerate((0.5, 0.9, 0.7)):
        keep.on_epoch_end(epoch, {"loss": loss})
    assert [line.endswith("kept") for line in capsys.readouterr().out.splitlines()] == [True] * 3


def test_two_trainings_with_one_seed_give_the_same_dice(notebook, arrays):
    def train():
        keras.utils.set_random_seed(5)
        model = notebook.unet(16, 4, 3.0, 2.0)
        model.compile("adam", notebook.dice_and_cross_entropy, metrics=[notebook.Dice()])
        batches = notebook.Batches(*arrays, range(7), 2, 5, notebook.augment)
        return model.fit(batches, epochs=3, verbose=0).history

    first, second = train(), train()
    np.testing.assert_allclose(first["dice"], second["dice"], atol=5e-4)
    np.testing.assert_allclose(first["loss"], second["loss"], atol=5e-4)


def test_a_model_name_that_keras_does_not_save_is_refused_before_training(notebook, tmp_path):
    with pytest.raises(ValueError, match="ends with .keras"):
        notebook.keep_earlier(tmp_path / "unet.h5")


def test_an_earlier_model_is_renamed_and_not_overwritten(notebook, tmp_path):
    (tmp_path / "unet.keras").write_bytes(b"trained all night")
    notebook.keep_earlier(tmp_path / "unet.keras")
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == b"trained all night"
    assert kept.name.startswith("unet-2") and kept.suffix == ".keras"


def test_a_copy_in_another_precision_predicts_the_same(notebook):
    keras.utils.set_random_seed(0)
    network = notebook.unet(16, 2, 128.0, 64.0)
    twin = notebook.in_precision(network, "mixed_bfloat16")
    slices = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), np.uint8)
    exact, close = ops.convert_to_numpy(network(slices)), ops.convert_to_numpy(twin(slices))
    assert twin.layers[2].compute_dtype == "bfloat16"
    assert close.dtype == np.float32
    np.testing.assert_allclose(exact, close, atol=0.02)


def test_precision_can_be_chosen_and_auto_is_one_of_two(notebook):
    assert notebook.choose_precision("float32") == "float32"
    assert notebook.choose_precision("mixed_bfloat16") == "mixed_bfloat16"
    assert notebook.choose_precision("auto") in ("float32", "mixed_bfloat16")


def test_jax_computes_in_float32_on_a_cpu(notebook, monkeypatch):
    if "cpu" not in str(ops.zeros(1).device).lower():
        pytest.skip("needs a machine without a GPU")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert notebook.choose_precision("auto") == "float32"


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


def test_a_patient_gets_a_picture_a_slice_in_the_order_of_position(notebook, tmp_path, arrays):
    imgs, masks = arrays
    slices = pd.DataFrame({"slice": [6, 5, 4, 3, 2, 1, 0], "mask": "m"})
    part = data.Slices(imgs, masks, slices)
    (tmp_path / "p.1").mkdir()
    (tmp_path / "p.1" / "slice_0099.png").write_bytes(b"of an earlier scan")
    sheet = notebook.draw_patient(tmp_path / "p.1", part, masks * 0.9, np.arange(7))
    names = sorted(path.name for path in (tmp_path / "p.1").iterdir())
    assert names == [f"slice_{n:04d}.png" for n in range(7)]
    assert imread(tmp_path / "p.1" / names[0]).shape == (512, 512, 3)
    assert imread(tmp_path / "p.1.png").shape == sheet.shape == (2 * 256, 6 * 256, 3)


def test_predictions_stay_in_line_with_their_slices(notebook, arrays, tmp_path):
    class Echo:
        """Stands for a network: predicts the gray value divided by ten."""

        def predict(self, batches, verbose):
            return np.concatenate([batches[n][0] for n in range(len(batches))]) / 10

    groups = [np.array([4, 5, 6]), np.array([0, 1, 2, 3])]
    probabilities = notebook.predict_slices(Echo(), arrays[0], groups, 2, tmp_path / "p.npy")
    np.testing.assert_allclose(probabilities[:, 0, 0], np.arange(7) / 10, atol=1e-3)
    assert isinstance(probabilities, np.memmap)


def test_a_full_disk_is_an_error_before_the_first_prediction(notebook, tmp_path, monkeypatch):
    def disk_full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", disk_full)
    no_network, imgs = None, np.zeros((3, 16, 16), np.uint8)
    with pytest.raises(OSError, match="No space left"):
        notebook.predict_slices(no_network, imgs, [np.arange(3)], 2, tmp_path / "p.npy")


def test_the_best_and_the_worst_patient_are_shown_as_what_they_are(notebook):
    probabilities = np.zeros((4, 16, 16), np.float16)
    masks = np.zeros((4, 16, 16), np.uint8)
    masks[3, :4], masks[1, :8] = 1, 1  # missed
    slices = pd.DataFrame({"slice": [7, 8, 5, 6]})
    names = dict(
        scores=pd.DataFrame({"patient": ["a", "b", "c"], "dice": [0.5, 0.9, np.nan]}),
        patients={"a": np.array([0, 1]), "b": np.array([2, 3])},
        test=data.Slices(np.zeros((4, 16, 16), np.uint8), masks, slices),
        probabilities=probabilities,
    )
    notebook.plt.close("all")
    exec(code(cells()[-1]), {**vars(notebook), **names})
    titles = [notebook.plt.figure(n).axes[0].get_title() for n in notebook.plt.get_fignums()]
    notebook.plt.close("all")
    assert titles == ["best patient: b, slice 6", "worst patient: a, slice 8"]


@pytest.mark.parametrize("recipe", evaluate.RECIPES)
def test_each_recipe_still_fits_the_notebook(recipe):
    compile(evaluate.as_script(*evaluate.RECIPES[recipe]), recipe, "exec")


@pytest.mark.parametrize("recipe", evaluate.DATA_LINES)
def test_each_recipe_still_fits_data_py(recipe):
    assert recipe in evaluate.RECIPES
    evaluate.exchange((REPO / "data.py").read_text(), evaluate.DATA_LINES[recipe])


def test_a_recipe_whose_line_is_gone_is_refused():
    with pytest.raises(ValueError, match="0 times in the code, wanted once"):
        evaluate.as_script({}, {"no such line": ""})
