"""The handwriting example: its data, its reader, and its programs as users start them, under every engine."""

from __future__ import annotations

import csv
import itertools
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import tensorflow as tf

import distpad
import elastic_job
import worlds
from distpad import backends

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "handwriting"
sys.path.insert(0, str(EXAMPLE.parent))

from handwriting import decode, digits, engines, folder, learner, model, reading, rows, strings  # noqa: E402 (the path comes first)

LIMIT_S = 240
pytestmark = pytest.mark.timeout(LIMIT_S + 20)
SHORT = (
    "--steps",
    "4",
    "--batch",
    "8",
    "--strings",
    "24",
    "--boundaries",
    "2",
    "--eval-strings",
    "4",
    "--checkpoint-every",
    "2",
)


# -- the data ---------------------------------------------------------------------------------------------------------


@pytest.mark.one_stack
def test_no_digit_to_train_on_is_one_to_test_with():
    train, test = digits.load("train"), digits.load("test")
    assert len(train.images) + len(test.images) == 1797 and len(test.images) == 359
    # A few pictures of the set are alike to the last pixel; what must not be on both sides is a place in the set.
    from sklearn.datasets import load_digits

    places = {image.tobytes(): place for place, image in enumerate(digits._enlarge(load_digits().images / 16.0))}
    assert not {places[i.tobytes()] for i in train.images} & {places[i.tobytes()] for i in test.images}


@pytest.mark.one_stack
def test_a_string_depends_on_seed_and_index_alone():
    first, second = strings.DigitStrings("train", seed=3, count=5), strings.DigitStrings("train", seed=3, count=9)
    expected = [first[index] for index in range(5)]
    found = [second[index] for index in reversed(range(5))][::-1]
    for a, b in zip(expected, found):
        assert a.text == b.text
        np.testing.assert_array_equal(a.image, b.image)
    assert strings.DigitStrings("train", seed=4, count=1)[0].text != expected[0].text


@pytest.mark.one_stack
def test_widths_and_lengths_are_known_before_anything_is_drawn():
    source = strings.DigitStrings("test", seed=6, count=40)
    assert source.widths.tolist() == [len(example.image) for example in source]
    assert source.lengths.tolist() == [len(example.text) for example in source]


@pytest.mark.one_stack
def test_strings_vary_in_length_width_slant_and_thickness():
    drawn = list(strings.DigitStrings("train", seed=0, count=300))
    assert {len(example.text) for example in drawn} == set(range(1, 13))
    assert all(
        example.image.shape[1] == 16 and 0 <= example.image.min() <= example.image.max() <= 1 for example in drawn
    )
    long = [example.image for example in drawn if len(example.text) == 12]
    widths = [len(image) for image in long]
    assert max(widths) > 1.2 * min(widths)
    ink = [float(image.sum()) for image in long]
    assert max(ink) > 1.5 * min(ink)
    slants = [slant(image) for image in long[:12]]
    assert min(slants) < -0.1 and max(slants) > 0.1


def slant(image: np.ndarray) -> float:
    """By how many columns a line must be sheared per row for its columns' ink to be most uneven (strokes upright)."""

    def unevenness(shear: float) -> float:
        shifted = [np.roll(row, round(shear * (place - 8))) for place, row in enumerate(image.T)]
        return float(np.var(np.sum(shifted, axis=0)))

    return max(np.linspace(-0.5, 0.5, 11), key=unevenness)


def test_rows_are_numbers_and_end_where_asked_to():
    source = strings.DigitStrings("train", seed=0, count=3)
    for end in (False, True):
        data = rows.Rows(source, end=end)
        assert len(data) == 3
        for row, example in zip((data[0], data[2]), (source[0], source[2])):
            assert row["image"].shape == (len(example.image), 16, 1)
            assert row["label"].tolist() == [int(digit) for digit in example.text] + [10] * end


def test_a_picture_that_fits_a_boundary_has_a_text_that_fits_the_boundary_beside_it():
    source = strings.DigitStrings("train", seed=0, count=500)
    buckets = rows.joint_buckets(source.widths, source.lengths, boundaries=6)
    assert len(buckets["image"].boundaries) == len(buckets["label"].boundaries) == 6
    for width, length in zip(source.widths, source.lengths):
        assert buckets["label"].index(int(length)) <= buckets["image"].index(int(width))
    alike = rows.joint_buckets(
        np.array([20, 30, 40]), np.array([5, 5, 5]), boundaries=3
    )  # boundaries rise all the same
    assert alike["label"].boundaries == (5, 6, 7)


@pytest.mark.parametrize("sampling", [{"global_batch_size": 10}, {"max_tokens": 600}])
def test_a_global_batch_holds_the_same_examples_for_any_number_of_replicas(sampling):
    data = rows.Rows(strings.DigitStrings("train", seed=0, count=60))
    plans = []
    for replicas in (1, 3):
        engine = engines.Engine("local", Pretended(replicas))
        steps = [[batch.indices for batch in step] for step in rows.batches(engine, data, boundaries=3, **sampling)]
        plans.append([sorted(i for part in step for i in part if i >= 0) for step in steps])
        assert all(len(step) == replicas for step in steps)
    assert plans[0] == plans[1] and sorted(itertools.chain(*plans[0])) == list(range(60))


def test_shuffled_batches_are_dealt_alike_to_any_number_of_replicas():
    data = rows.Rows(strings.DigitStrings("train", seed=0, count=30))
    whole, parts = (
        list(rows.shuffled_batches(engines.Engine("local", Pretended(replicas)), data, 8, steps=5))
        for replicas in (1, 4)
    )
    assert len(whole) == len(parts) == 5
    for (one,), several in zip(whole, parts):
        assert [text for part in several for text in part.data["label"].tolist()] == one.data["label"].tolist()


class Pretended(backends.LocalBackend):
    """One worker's view of several replicas, without an engine."""

    def __init__(self, replicas):
        self.num_replicas = replicas

    def to_device(self, values):
        return values


# -- decoding ---------------------------------------------------------------------------------------------------------


def ctc_by_hand(best: list[int], alphabet: str) -> str:
    return "".join(alphabet[k] for k, _ in itertools.groupby(best) if k < len(alphabet))


def test_ctc_texts_merge_repetitions_and_leave_out_blanks_and_padding():
    rng = np.random.default_rng(0)
    for _ in range(200):
        best = rng.integers(0, 4, size=(3, 9))
        columns = rng.integers(0, 10, size=3)
        expected = [ctc_by_hand(list(row[:count]), "abc") for row, count in zip(best, columns)]
        assert decode.ctc_texts(np.eye(4)[best], columns, "abc") == expected


def test_position_texts_stop_at_the_first_end():
    best = np.array([[0, 1, 2, 0], [2, 0, 0, 0], [1, 1, 0, 1]])
    assert decode.position_texts(np.eye(3)[best], "ab") == ["ab", "", "bbab"]


def errors_by_recursion(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        errors_by_recursion(a[1:], b) + 1,
        errors_by_recursion(a, b[1:]) + 1,
        errors_by_recursion(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_character_errors_equal_the_definition():
    rng = np.random.default_rng(1)
    for _ in range(100):
        read, text = ("".join(rng.choice(list("ab"), size=rng.integers(0, 6))) for _ in range(2))
        assert decode.character_errors(read, text) == errors_by_recursion(read, text)
    assert decode.character_error_rate(["12", "345"], ["12", "34"]) == 0.25  # over characters, not over texts


# -- the reader -------------------------------------------------------------------------------------------------------


def test_empty_labels_of_filling_rows_have_a_loss_that_is_finite():
    label = {"label": tf.constant([[1, 2], [0, 0]]), "length": tf.constant([2, 0]), "columns": tf.constant([5, 5])}
    assert np.isfinite(learner.ctc(label, tf.zeros([2, 5, 4]))).all()


@pytest.mark.parametrize("head", ["ctc", "position"])
def test_a_rows_result_depends_neither_on_padding_nor_on_other_rows(head):
    tf.keras.utils.set_random_seed(0)
    reader = model.build(model.Config("0123456789", head))
    image, widths, _ = distpad.pad([e.image for e in strings.DigitStrings("train", seed=5, count=4)], mask=False)
    batch = {"image": image[..., np.newaxis], "width": widths}
    far = np.pad(batch["image"], [(0, 0), (0, 23), (0, 0), (0, 0)])
    several = reader({"image": far, "width": batch["width"], "positions": tf.constant(6)}).numpy()
    for row, width in enumerate(batch["width"]):
        image = batch["image"][row : row + 1, :width]
        alone = reader({"image": image, "width": tf.constant([width]), "positions": tf.constant(6)}).numpy()[0]
        assert len(alone) == (model.columns(width) if head == "ctc" else 6)
        np.testing.assert_allclose(several[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_the_lean_recurrent_layer_equals_keras_bidirectional_gru():
    from handwriting import recurrent

    tf.keras.utils.set_random_seed(0)
    ours = recurrent.BidirectionalGRU(5)
    x, lengths = tf.random.normal([3, 7, 4]), tf.constant([7, 3, 1])
    found = ours(x, lengths).numpy()
    keras_layer = tf.keras.layers.Bidirectional(tf.keras.layers.GRU(5, return_sequences=True))
    mask = tf.sequence_mask(lengths, 7)
    keras_layer(x, mask=mask)
    kernel, bias = (array.numpy() for array in (ours.gates.kernel, ours.gates.bias))
    recurrent_kernel, recurrent_bias = np.array(ours.kernel), np.array(ours.bias)
    both = []
    for way in range(2):
        columns = slice(15 * way, 15 * way + 15)
        both += [kernel[:, columns], recurrent_kernel[way], np.stack([bias[columns], recurrent_bias[way, 0]])]
    keras_layer.set_weights(both)
    expected = keras_layer(x, mask=mask).numpy()
    for row, length in enumerate(lengths.numpy()):
        np.testing.assert_allclose(found[row, :length], expected[row, :length], rtol=1e-5, atol=1e-6)


def test_a_saved_reader_reads_the_same(tmp_path):
    tf.keras.utils.set_random_seed(1)
    reader = reading.TextReader(model.Config("0123456789"))
    images = [example.image for example in strings.DigitStrings("test", seed=0, count=5)]
    reader.save(tmp_path)
    assert reading.TextReader.load(tmp_path).read(images) == reader.read(images)


# -- a user's own pictures --------------------------------------------------------------------------------------------


def own_pictures(path: pathlib.Path, count: int = 12, ink_is_dark: bool = True) -> pathlib.Path:
    """A folder as a user has it: pictures of different sizes and a labels.csv."""
    from PIL import Image

    path.mkdir()
    source = strings.DigitStrings("train", seed=9, count=count)
    with (path / "labels.csv").open("w", newline="") as lines:
        table = csv.writer(lines)
        table.writerow(["file", "text"])
        for index, example in enumerate(source):
            ink = np.clip(example.image.T, 0, 1)
            picture = Image.fromarray(np.uint8(255 * (1 - ink if ink_is_dark else ink)))
            factor = 2 + index % 3
            picture.resize((factor * picture.width, factor * picture.height)).save(path / f"{index}.png")
            table.writerow([f"{index}.png", example.text.replace("1", "é")])
    return path


@pytest.mark.one_stack
def test_own_pictures_are_split_by_name_and_read_light_on_dark_or_dark_on_light(tmp_path):
    dark = own_pictures(tmp_path / "dark")
    light = own_pictures(tmp_path / "light", ink_is_dark=False)
    train, test = (folder.FolderStrings(dark, split, height=16) for split in ("train", "test"))
    assert len(train) + len(test) == 12 and len(test) >= 1 and not set(train.names) & set(test.names)
    assert "é" in train.alphabet and "1" not in train.alphabet
    assert [len(example.image) for example in train.examples] == train.widths.tolist()
    other = folder.FolderStrings(light, "train", height=16)
    for a, b in zip(train.examples, other.examples):
        np.testing.assert_allclose(a.image, b.image, atol=0.02)
        assert a.image.shape[1] == 16


def broken(change: str, path: pathlib.Path) -> pathlib.Path:
    if change == "no labels.csv":
        path.mkdir()
        return path
    made = own_pictures(path)
    labels = made / "labels.csv"
    if change == "no such file":
        (made / "3.png").unlink()
    elif change == "no picture":
        (made / "3.png").write_text("no picture at all")
    elif change == "no text":
        labels.write_text("file,text\n1.png,\n2.png,12\n")
    elif change == "no column":
        labels.write_text("image,text\n1.png,7\n")
    elif change == "one row":
        labels.write_text("file,text\n1.png,7\n")
    elif change == "a text too long":
        labels.write_text("file,text\n" + "".join(f"{k}.png,{'1' * 200}\n" for k in range(12)))
    return made


@pytest.mark.one_stack
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no labels.csv", "holds no labels.csv"),
        ("no such file", "the file does not exist"),
        ("no picture", "cannot be read as a picture"),
        ("no text", "has no text"),
        ("no column", "has no column file"),
        ("one row", "names 1 pictures"),
        ("a text too long", "needs 399 columns"),
    ],
)
def test_what_is_wrong_with_own_pictures_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        folder.check(folder.FolderStrings(broken(change, tmp_path / "pictures"), "train", 32), "ctc")


# -- the programs -----------------------------------------------------------------------------------------------------


def start(world: str, script: str, *arguments: object) -> tuple[int, str]:
    return worlds.start(world, EXAMPLE / script, *map(str, arguments), limit_s=LIMIT_S)[:2]


ENGINES = {
    "local": ("local", 1),
    "mirrored:2": ("mirrored", 2),
    "multiworker:2": ("multiworker", 2),
    "horovod:2": ("horovod", 2),
}


@pytest.mark.one_stack
@pytest.mark.parametrize(
    ("world", "more"),  # tests/cluster and tests/launch train small in the others
    [
        ("mirrored:2", []),
        *[pytest.param(world, ["--certify"], marks=pytest.mark.wide) for world in ENGINES],
        *[pytest.param(world, ["--batch-normalization"], marks=pytest.mark.wide) for world in ENGINES],
    ],
)
def test_train_under_each_engine(tmp_path, world, more):
    backend, replicas = ENGINES[world]
    arguments = ("--backend", backend, "--replicas", replicas, "--out", tmp_path, "--resume=auto")
    code, output = start(world, "train.py", *arguments, *SHORT, *more)
    assert code == 0 and output.count("distpad certificate:") == ("--certify" in more), output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["backend"], summary["replicas"], summary["steps"]) == (backend, replicas, 4), output
    assert 0 < summary["character_error_rate"] < 20 and summary["held_out_strings"] == 4
    assert len(re.findall(r"character error rate", output)) == 1, output  # of all workers, one speaks
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    if replicas > 1:
        drift = json.loads((tmp_path / f"drift-{backend}-{replicas}.json").read_text())
        assert len(drift["distpad"]) == len(drift["naive"]) == 60
        assert max(drift["distpad"]) < 1e-5 < 1e-4 < drift["naive"][-1], (drift["distpad"][-1], drift["naive"][-1])


@pytest.mark.wide
@pytest.mark.timeout(4 * LIMIT_S)
def test_elastic_training_goes_on_after_a_worker_was_killed(tmp_path):
    out, steps = tmp_path / "out", 500
    small = ("--batch", 8, "--strings", 64, "--boundaries", 2, "--eval-strings", 4)
    often = ("--commit-every", 5, "--checkpoint-every", 10)
    arguments = ("--backend", "horovod", "--elastic", "--steps", steps, "--out", out, *small, *often)
    with elastic_job.Job(tmp_path, elastic_job.BOTH, EXAMPLE / "train.py", *arguments) as job:
        job.wait_until(lambda: list(out.glob("checkpoints/step-*10")), LIMIT_S)
        first = job.workers()
        assert sorted(first.values()) == [0, 1]
        job.kill(next(pid for pid, rank in first.items() if rank == 0))  # who writes
        job.wait_until(lambda: job.workers().keys() - first.keys(), LIMIT_S)
        assert job.finish(LIMIT_S) == 0, job.told()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["replicas"]) == (steps, 2)  # the last of them with another worker again
    assert list(out.glob(f"checkpoints/step-*{steps}"))
    assert len(re.findall(r"character error rate", job.output)) == 1, job.output


@pytest.mark.wide  # test_preemption.py resumes by default
def test_position_loss_resume_and_read(tmp_path):
    common = ("train.py", "--replicas", 2, "--loss", "position", "--no-drift", "--out")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for arguments in ((whole, "--resume=auto"), (halves, "--resume=auto", "--stop-at", 2), (halves, "--resume")):
        code, output = start("mirrored:2", *common, *arguments, *SHORT)
        assert code == 0, output
    at_once, resumed = (np.load(out / "reader" / "weights.npz") for out in (whole, halves))
    for name in at_once.files:
        np.testing.assert_allclose(resumed[name], at_once[name], rtol=1e-5, atol=1e-7)
    sample = whole / "samples" / "1.png"
    code, output = start("local", "read.py", "--model", whole, sample)
    assert code == 0 and re.fullmatch(rf"{re.escape(str(sample))}\t[0-9]*\n", output), output


@pytest.mark.wide
def test_own_pictures_are_trained_on(tmp_path):
    pictures = own_pictures(tmp_path / "pictures")
    arguments = ("--data", pictures, "--height", 16, "--replicas", 2, "--no-drift", "--out", tmp_path / "out", *SHORT)
    code, output = start("mirrored:2", "train.py", *arguments)
    assert code == 0, output
    assert json.loads((tmp_path / "out" / "reader" / "config.json").read_text())["alphabet"] == "023456789é"


@pytest.mark.one_stack
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "mirored"), "--backend is 'mirored', expected one of local, mirrored"),
        (("--replicas", "0"), "--replicas is 0"),
        (("--backend", "multiworker"), "launch/multiworker.sh"),
        (("--backend", "local", "--replicas", "3"), "replicas is 3, expected 1"),
        (("--backend", "local", "--resume"), "--resume"),
        (("--resume", "perhaps"), "choose from"),
        (("--boundaries", "0"), "--boundaries is 0"),
        (("--elastic",), "--backend is mirrored, expected horovod with --elastic"),
        (("--backend", "local", "--max-columns", "10"), "max_tokens is 10, expected at least"),
        (("--backend", "local", "--data", "no-such-folder"), "holds no labels.csv"),
        (("--height", "30"), "--height is 30"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, monkeypatch, capsys, arguments, message):
    """In this process, which has imported TensorFlow and makes no devices for them."""
    from handwriting import train

    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code and message in f"{end.value.code} {capsys.readouterr().err}"


@pytest.mark.one_stack
def test_a_wrong_argument_ends_the_program_without_a_traceback(tmp_path):
    code, output = start("local", "train.py", "--batch", 1, "--replicas", 2, "--out", tmp_path)
    assert code != 0 and "--batch is 1" in output and "Traceback" not in output, output


def test_reading_without_a_reader_says_how_to_get_one(tmp_path, monkeypatch):
    from handwriting import read

    monkeypatch.setattr(sys, "argv", ["read.py", "--model", str(tmp_path), str(tmp_path / "1.png")])
    with pytest.raises(SystemExit, match="Train one first"):
        read.main()
