"""Readers: every kind of source gives the same batches as a list of its examples, by rows or by columns."""

from __future__ import annotations

import array
import collections
import gc
import itertools
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

import distpad
from distpad.data import collate, config, measures, reader, readers

COUNT = 23
RANDOM = np.random.default_rng(0)
EXAMPLES = [
    {
        "y": RANDOM.integers(1, 100, n),
        "image": RANDOM.random((n + 1, 1 + i % 4, 2)).astype(np.float32),
        "tag": [b"a", b"bc\0", b""][i % 3],
        "deep": ({"v": np.float32(i)}, RANDOM.integers(0, 9, (2, 3))),
    }
    for i, n in enumerate(RANDOM.integers(0, 6, COUNT))
]
PADDING = {"y": distpad.Pad(value=-1), "image": distpad.Pad((0, 1))}
SPEC = {
    "y": tf.TensorSpec([None], tf.int64),
    "image": tf.TensorSpec([None, None, 2]),
    "tag": tf.TensorSpec([], tf.string),
    "deep": ({"v": tf.TensorSpec([])}, tf.TensorSpec([2, 3], tf.int64)),
}


def made(source, size=4, **options):
    options = {"padding": PADDING, "tokens": "y", "weights": None, "buckets": None, "backend": "local", **options}
    return distpad.PaddedBatches(source, size, **options)


def leaves(batches):
    return [[np.asarray(leaf) for leaf in tf.nest.flatten(batch)] for batch in batches]


def assert_same(found, wanted):
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all()


class Indexable:
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class ByList(Indexable):
    """As Hugging Face's and PyTorch's data sets."""

    def __init__(self, rows):
        super().__init__(rows)
        self.calls = []

    def __getitems__(self, indices):
        self.calls.append(indices)
        return [self.rows[i] for i in indices]

    def __getitem__(self, index):
        raise AssertionError("one by one")


class Iterable:
    def __iter__(self):
        return iter(EXAMPLES)


def dataset(spec=SPEC):
    return tf.data.Dataset.from_generator(lambda: iter(EXAMPLES), output_signature=spec)


UNKNOWN = tf.nest.map_structure(lambda spec: tf.TensorSpec(None, spec.dtype), SPEC)
COLUMNS = {
    "y": tf.ragged.constant([example["y"].tolist() for example in EXAMPLES], dtype=tf.int64),
    "image": [example["image"] for example in EXAMPLES],
    "tag": np.array([example["tag"] for example in EXAMPLES], object),
    "deep": (
        {"v": np.arange(COUNT, dtype=np.float32)},
        tf.constant(np.stack([example["deep"][1] for example in EXAMPLES])),
    ),
}
SOURCES = {
    "indexable": lambda: (Indexable(EXAMPLES), {}),
    "16 threads": lambda: (Indexable(EXAMPLES), {"num_parallel_reads": 16}),
    "a list in threads": lambda: (EXAMPLES, {"num_parallel_reads": 2}),
    "by list": lambda: (ByList(EXAMPLES), {}),
    "by list, 3 at once": lambda: (ByList(EXAMPLES), {"num_parallel_reads": 3}),
    "iterable": lambda: (Iterable(), {}),
    "tf.data": lambda: (dataset(), {}),
    "tf.data of a known size": lambda: (dataset().apply(tf.data.experimental.assert_cardinality(COUNT)), {}),
    "tf.data of unknown rank": lambda: (dataset(UNKNOWN), {}),
    "Columns": lambda: (distpad.Columns(COLUMNS), {}),
}


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.wide)])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_batches_of_a_list(kind, accumulate):
    source, options = SOURCES[kind]()
    batches = made(source, accumulation_steps=accumulate, lookahead=4, **options)
    wanted = leaves(made(EXAMPLES, accumulation_steps=accumulate, lookahead=4))
    for _ in range(3):  # the second epoch was read ahead
        assert_same(leaves(batches), wanted)


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.wide), 3, pytest.param(5, marks=pytest.mark.wide)])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_resumes(kind, stop):
    source, options = SOURCES[kind]()
    stopped = made(source, **options)
    list(itertools.islice(stopped, stop))
    resumed = made(SOURCES[kind]()[0], **options)
    resumed.load_state_dict(stopped.state_dict())
    assert_same(leaves(resumed), leaves(made(EXAMPLES))[stop:])


@pytest.mark.parametrize("kind", ["indexable", "16 threads", "by list", "Columns"])
def test_a_sampler_gives_the_batches_of_a_list(kind):
    source, options = SOURCES[kind]()
    sampler = distpad.LengthSampler([len(example["y"]) for example in EXAMPLES], global_batch_size=4, seed=3)
    batches, wanted = made((source, sampler), None, **options), made((EXAMPLES, sampler), None)
    for _ in range(2):
        assert_same(leaves(batches), leaves(wanted))


def test_getitems_is_asked_once_a_step():
    source = ByList(EXAMPLES)
    list(made(source, lookahead=8))
    assert source.calls[:6] == [list(range(at, min(at + 4, COUNT))) for at in range(0, COUNT, 4)]


@pytest.mark.parametrize(
    ("answer", "found"),
    [(lambda rows: rows[:-1], "3 examples"), (dict, "a dict"), (tuple, "a tuple"), (lambda _: None, "a NoneType")],
)
def test_a_wrong_answer_of_getitems_is_named(answer, found):
    class Wrong(ByList):
        def __getitems__(self, indices):
            return answer([("key", "value")] * len(indices))

    with pytest.raises(ValueError, match=rf"source\.__getitems__ is {found}, expected a list of 4"):
        next(iter(made(Wrong(EXAMPLES))))


@pytest.mark.parametrize("num_parallel_reads", [1, 4])
@pytest.mark.parametrize("error", [KeyError("gone"), SystemExit("bye")])
def test_an_error_of_a_read_is_the_error_of_its_step(error, num_parallel_reads):
    class Fails(Indexable):
        def __getitem__(self, index):
            if index == 13:
                raise error
            return self.rows[index]

    batches = iter(made(Fails(EXAMPLES), num_parallel_reads=num_parallel_reads))
    assert len([next(batches) for _ in range(3)]) == 3
    with pytest.raises(type(error), match=r"gone|bye"):
        next(batches)


def test_parallel_reads_are_parallel_and_bounded():
    lock, running, most, read = threading.Lock(), 0, 0, 0

    class Slow(Indexable):
        def __getitem__(self, index):
            nonlocal running, most, read
            with lock:
                running, read = running + 1, read + 1
                most = max(most, running)
            time.sleep(0.01)
            with lock:
                running -= 1
            return {"y": [index]}

    batches = iter(made(Slow(range(1000)), padding={"y": distpad.Pad()}, num_parallel_reads=8, lookahead=2))
    for step in range(4):
        batch = next(batches)
        assert batch.data["y"][:, 0].numpy().tolist() == [4 * step + i for i in range(4)]
    assert most == 8 and read <= 4 * (4 + 3 * 2) + 3 * 8
    batches.close()


@pytest.mark.parametrize(
    "source", [tf.data.Dataset.range(3).map(lambda i: {"y": i[None]}), Iterable(), {"a": 1}], ids=["tf", "iter", "dict"]
)
def test_what_cannot_be_read_in_parallel_is_refused(source):
    with pytest.raises(ValueError, match="num_parallel_reads is 2, expected 1"):
        made(source, num_parallel_reads=2)
    with pytest.raises(ValueError, match="num_parallel_reads is 0, expected at least 1"):
        made(EXAMPLES, num_parallel_reads=0)


# -- elements of tf.data ----------------------------------------------------------------------------------------------


def test_sparse_elements_are_sequences():
    rows = tf.sparse.from_dense([[5, 6, 0], [0, 7, 0]])
    sparse = tf.data.Dataset.from_tensor_slices({"y": rows, "s": [1.0, 2.0]})
    (batch,) = made(sparse, padding={"y": distpad.Pad()})
    assert batch.data["y"].numpy().tolist()[:2] == [[5, 6, 0], [0, 7, 0]]
    serialized = [
        tf.train.Example(
            features=tf.train.Features(feature={"y": tf.train.Feature(int64_list=tf.train.Int64List(value=[i] * i))})
        ).SerializeToString()
        for i in (1, 3, 2)
    ]
    parsed = tf.data.Dataset.from_tensor_slices(serialized).map(
        lambda text: tf.io.parse_single_example(text, {"y": tf.io.VarLenFeature(tf.int64)})
    )
    (batch,) = made(parsed, 3, padding={"y": distpad.Pad()})
    assert batch.data["y"].numpy().tolist() == [[1, 0, 0], [3, 3, 3], [2, 2, 0]]
    assert batch.lengths["y"].numpy().tolist() == [1, 3, 2] and float(batch.counts.tokens) == 6


@pytest.mark.parametrize("kind", ["tf.data", "Columns"])
def test_ragged_examples_count_their_real_positions(kind):
    """Words of characters: rows of different lengths within one example."""
    words = tf.ragged.constant([[[1, 2], [3]], [[4]], [], [[5], [], [6, 7, 8]]], dtype=tf.int64)
    source = tf.data.Dataset.from_tensor_slices({"y": words})
    source = source if kind == "tf.data" else distpad.Columns({"y": words})
    (batch,) = made(source, 5, padding={"y": distpad.Pad((0, 1))})
    assert (batch.data["y"][:4].numpy() == words.to_tensor().numpy()).all()
    assert batch.lengths["y"].numpy().tolist() == [2, 1, 0, 3, 0]
    assert float(batch.counts.tokens) == 8 and float(batch.counts.sequences) == 3
    mask = batch.loss_inputs.sample_weight.numpy()
    assert mask.sum() == 8 and (mask[:4] == (words.to_tensor().numpy() > 0)).all()
    inner = distpad.Columns({"y": words[:1]})
    with pytest.raises(ValueError, match=r"'y' is ragged within examples, expected arrays, or positions along axis 0"):
        list(made(inner, 2, padding={"y": distpad.Pad(1)}))


@pytest.mark.parametrize("lookahead", [1, 8])
def test_an_element_of_another_shape_is_named(lookahead):
    rows = [np.ones([2, 3]), np.ones([1, 3]), np.ones([2, 4]), np.ones([2, 3])]
    source = tf.data.Dataset.from_generator(
        lambda: ({"y": row} for row in rows), output_signature={"y": tf.TensorSpec([None, None], tf.float64)}
    )
    for size in (1, 4):
        with pytest.raises(ValueError, match=r"'y' of example 2 is of shape \(2, 4\), expected \(None, 3\)"):
            list(made(source, size, padding={"y": distpad.Pad()}, lookahead=lookahead))


def test_an_error_of_an_element_is_the_error_of_its_step():
    source = tf.data.Dataset.range(9).map(lambda i: {"y": tf.ensure_shape(tf.range(i), [None]) // (i - 6)})
    batches = iter(made(source, 2, padding={"y": distpad.Pad()}))
    assert len([next(batches) for _ in range(3)]) == 3
    with pytest.raises(tf.errors.InvalidArgumentError):
        next(batches)


# -- the next epoch ---------------------------------------------------------------------------------------------------


def ours():
    return {thread for thread in threading.enumerate() if thread.name.startswith("distpad")}


def wait_until(is_so):
    until = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_windows_grow_from_one_step_and_the_next_epoch_is_read_ahead():
    class Counted(Indexable):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return self.rows[index]

    source, threads = Counted(EXAMPLES), ours()
    batches = made(source, 1, lookahead=8)
    iterator = iter(batches)
    next(iterator)
    time.sleep(0.2)
    assert source.read <= 1 + 2 + 4  # not a window of 8 steps
    for _ in iterator:
        pass
    wait_until(lambda: source.read > COUNT and not ours() - threads)  # the reader has left
    assert source.read == COUNT + 1  # one step of the next epoch, and no more
    assert_same(leaves(batches), leaves(made(EXAMPLES, 1)))


def test_deleted_batches_leave_no_threads():
    threads = set(threading.enumerate())
    batches = made(Indexable(EXAMPLES), num_parallel_reads=8)
    list(batches)
    del batches
    gc.collect()
    wait_until(lambda: not set(threading.enumerate()) - threads)


def test_a_reader_that_is_closed_while_it_becomes_idle_closes_its_source():
    goes_on, closed = threading.Event(), threading.Event()

    def steps():
        try:
            goes_on.wait(10)
            yield readers.Step(1, np.arange(1), [1], [EXAMPLES[0]])
            yield readers.Step(1, np.arange(1), [1], [EXAMPLES[0]])
        finally:
            closed.set()

    class ClosesTheReader:
        """In place of the lock that the thread takes after its first window."""

        def __enter__(self):
            ahead.close(0.0)

        def __exit__(self, *_):
            pass

    options = 1, PADDING, "y", None, None, 1, 1, 1, False, False, 60, 600
    prints = measures.Fingerprints(0, 1, False)
    ahead = reader.Reader(steps, config.Config(*options), None, prints, waits=True)
    ahead._lock = ClosesTheReader()
    goes_on.set()
    assert closed.wait(10)


def test_a_list_that_grows_between_epochs_is_read_whole():
    rows = [{"y": [1]}, {"y": [2]}]
    for source in (rows, Indexable(rows)):
        batches = made(source, 1, padding={"y": distpad.Pad()})
        before = len(list(batches))
        rows.append({"y": [3]})
        assert len(list(batches)) == before + 1


def test_an_epoch_that_was_read_ahead_is_dropped_with_another_position():
    batches = made(Indexable(EXAMPLES))
    state = batches.state_dict()
    list(batches)
    batches.load_state_dict({**state, "epoch": 7})
    assert_same(leaves(batches), leaves(made(EXAMPLES)))
    assert batches.state_dict()["epoch"] == 8


# -- sources that are easily read wrongly -----------------------------------------------------------------------------


class Restarts:
    """Its iterator is itself, and ``iter`` restarts it."""

    def __iter__(self):
        self.at = 0
        return self

    def __next__(self):
        if self.at == COUNT:
            raise StopIteration
        self.at += 1
        return {"y": [self.at]}


def test_a_source_that_is_its_own_iterator_is_read_once():
    batches = made(Restarts(), padding={"y": distpad.Pad()})
    found = [int(row) for batch in batches for row in batch.data["y"][: int(batch.rows), 0]]
    assert found == [*range(1, COUNT + 1)]


def views(buffer):
    view = buffer[:]
    view.flags.writeable = False
    return view


@pytest.mark.parametrize(
    "kept",
    [lambda b: b, lambda b: {"y": b}, lambda b: collections.OrderedDict(y=b), lambda b: ({"y": b},), lambda b: [b]],
    ids=["bare", "dict", "ordered", "nested", "list"],
)
@pytest.mark.parametrize("buffer", [np.zeros(2, np.int64), [0, 0], array.array("q", [0, 0]), views(np.zeros(2))])
def test_a_source_may_reuse_every_kind_of_buffer(kept, buffer):
    def source():
        for k in range(6):
            if isinstance(buffer, np.ndarray):
                (buffer.base if buffer.base is not None else buffer)[:] = k
            else:
                buffer[0] = buffer[1] = k
            yield kept(buffer)

    example = kept([0, 0])
    name = "y" if isinstance(example, dict) else "0/y" if isinstance(example, tuple) else 0
    batches = made(source(), 2, padding={name: distpad.Pad()}, tokens=name)
    found = [tf.nest.flatten(batch.data)[0].numpy().reshape(2, -1)[:, 0].tolist() for batch in batches]
    assert found == [[0, 1], [2, 3], [4, 5]]


def test_masked_elements_are_refused():
    rows = np.ma.masked_array([[1.0, 2.0], [3.0, 4.0]], [[0, 1], [0, 0]])
    for source in ([{"y": row} for row in rows], None):
        with pytest.raises(ValueError, match="is a masked array, expected one without masked elements"):
            list(made(source or distpad.Columns({"y": rows}), padding={"y": distpad.Pad()}))
    whole = [{"y": np.ma.masked_array([1.0, 2.0], [0, 0])}]
    assert len(list(made(whole, padding={"y": distpad.Pad()}))) == 1


def test_a_dataset_of_tuples_of_one_keeps_its_structure():
    source = tf.data.Dataset.range(3).map(lambda i: (tf.sparse.from_dense(tf.range(i) + 1),))
    (batch,) = made(source, 3, padding={0: distpad.Pad()}, tokens=0)
    assert isinstance(batch.data, tuple) and batch.data[0].numpy().tolist() == [[0, 0], [1, 0], [1, 2]]


def test_a_cardinality_that_is_too_low_is_an_error():
    source = tf.data.Dataset.range(5).repeat().map(lambda i: {"y": tf.range(i)})
    with pytest.raises((ValueError, tf.errors.FailedPreconditionError)):
        list(made(source.apply(tf.data.experimental.assert_cardinality(8)), padding={"y": distpad.Pad()}))


def test_single_examples_of_a_few_equal_lengths_are_no_batches():
    def examples():
        for n in (5, 5, 5, 5, 9, 3):
            yield {"x": np.ones([n, 8]), "y": np.ones([n, 3])}

    spec = {"x": tf.TensorSpec([None, 8], tf.float64), "y": tf.TensorSpec([None, 3], tf.float64)}
    source = tf.data.Dataset.from_generator(examples, output_signature=spec)
    padding = {"x": distpad.Pad(), "y": distpad.Pad()}
    assert [int(batch.rows) for batch in made(source, 2, padding=padding)] == [2, 2, 2]


def test_a_batch_that_does_not_come_is_an_error(monkeypatch):
    monkeypatch.setattr(collate.Padder, "_run", lambda self: self._stopped.wait(10))
    with pytest.raises(
        distpad.DistpadError, match=r"waited 2 s for a batch to be padded, expected less than timeout_s"
    ):
        next(iter(made(EXAMPLES, timeout_s=2)))
