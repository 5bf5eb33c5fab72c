"""Input pipelines that the benchmarks compare: PaddedBatches, tf.data, NumPy by hand, PyTorch and grain.

Each function returns an iterable of padded batches that can be iterated again, an epoch each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

import distpad
from distpad import backends

try:
    import torch
except ImportError:
    torch = None
try:
    import grain
except ImportError:
    grain = None

SHORT = 128  # by hand, rows of scalars up to this length are placed by a mask, others one by one
BUCKETS = 8


class Workload(NamedTuple):
    """Examples, and the names of their features of varying length; positions are those of the first."""

    examples: list[dict[str, Any]]
    padded: tuple[str, ...]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(example[self.padded[0]]) for example in self.examples])


class Iterations:
    """An iterable that calls a generator function for each iteration."""

    def __init__(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments

    def __iter__(self) -> Iterator[Any]:
        return self._function(*self._arguments)


def left_out() -> str:
    """Return a line that names the packages that are not installed, or an empty text."""
    missing = [name for name, package in (("torch", torch), ("grain", grain)) if package is None]
    return f"left out, not installed: {', '.join(missing)}" if missing else ""


# -- distpad ----------------------------------------------------------------------------------------------------------


def padded_batches(
    backend: backends.Backend, workload: Workload, source: Any, size: int | None, **options: Any
) -> distpad.PaddedBatches:
    """PaddedBatches over a source of the workload's examples."""
    padding = {name: distpad.Pad() for name in workload.padded}
    return distpad.PaddedBatches(
        source, size, padding=padding, tokens=workload.padded[0], replicated=True, backend=backend, **options
    )


def sampler(backend: backends.Backend, workload: Workload, size: int) -> distpad.LengthSampler:
    """A sampler of batches of similar length, ``size`` examples per replica."""
    return distpad.LengthSampler(workload.lengths, global_batch_size=size * backend.num_replicas)


# -- tf.data ----------------------------------------------------------------------------------------------------------


def tensors(workload: Workload) -> dict[str, Any]:
    """All examples of each feature: a RaggedTensor if their lengths vary, else an array."""
    found: dict[str, Any] = {}
    for name in workload.examples[0]:
        items = [example[name] for example in workload.examples]
        if name in workload.padded:
            found[name] = tf.RaggedTensor.from_row_lengths(np.concatenate(items), [len(item) for item in items])
        else:
            found[name] = np.array(items)
    return found


def unmapped(workload: Workload) -> tf.data.Dataset:
    """A dataset of slices of the tensors. ``padded_batch`` rejects it, since its elements are ragged tensors."""
    return tf.data.Dataset.from_tensor_slices(tensors(workload))


def mapped(workload: Workload) -> tf.data.Dataset:
    """A dataset with a small function, as most have; its elements are dense tensors."""
    return unmapped(workload).map(lambda example: {name: tf.identity(value) for name, value in example.items()})


def padded(dataset: tf.data.Dataset, size: int) -> tf.data.Dataset:
    return dataset.padded_batch(size).prefetch(tf.data.AUTOTUNE)


def ragged(dataset: tf.data.Dataset, size: int) -> tf.data.Dataset:
    def dense(batch: dict[str, Any]) -> dict[str, tf.Tensor]:
        return {name: v.to_tensor() if isinstance(v, tf.RaggedTensor) else v for name, v in batch.items()}

    return dataset.ragged_batch(size).map(dense).prefetch(tf.data.AUTOTUNE)


def bucketed(workload: Workload, dataset: tf.data.Dataset, size: int) -> tf.data.Dataset:
    """``bucket_by_sequence_length`` with equally full buckets."""
    inner = np.quantile(workload.lengths, np.arange(1, BUCKETS) / BUCKETS)
    boundaries = np.unique(inner.astype(int) + 1).tolist()  # a bucket's lengths are below its boundary
    sizes = [size] * (len(boundaries) + 1)

    def length(example: dict[str, tf.Tensor]) -> tf.Tensor:
        return tf.shape(example[workload.padded[0]])[0]

    return dataset.bucket_by_sequence_length(length, boundaries, sizes).prefetch(tf.data.AUTOTUNE)


# -- NumPy by hand ----------------------------------------------------------------------------------------------------


def by_hand(workload: Workload, size: int) -> Iterable[Any]:
    """Pad each batch of a list, as tensors."""

    def batches() -> Iterator[Any]:
        for begin in range(0, len(workload.examples), size):
            batch = pad_examples(workload.padded, workload.examples[begin : begin + size])
            yield {name: tf.constant(values) for name, values in batch.items()}

    return Iterations(batches)


def pad_examples(padded: Sequence[str], examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Pad the features of a few examples to the longest."""
    batch = {}
    for name in examples[0]:
        items = [example[name] for example in examples]
        if name not in padded:
            batch[name] = np.array(items)
            continue
        first = items[0]
        batch[name] = np.zeros([len(items), max(map(len, items)), *first.shape[1:]], first.dtype)
        for row, item in zip(batch[name], items):
            row[: len(item)] = item
    return batch


def by_hand_flat(workload: Workload, size: int) -> Iterable[Any]:
    """Pad each batch of features that are one array each: the limit of NumPy."""
    features = {}
    for name, tensor in tensors(workload).items():
        is_ragged = isinstance(tensor, tf.RaggedTensor)
        features[name] = (tensor.values.numpy(), tensor.row_splits.numpy()) if is_ragged else (tensor, None)

    def batches() -> Iterator[Any]:
        for begin in range(0, len(workload.examples), size):
            batch = {}
            for name, (values, splits) in features.items():
                of_batch = None if splits is None else splits[begin : begin + size + 1]
                batch[name] = values[begin : begin + size] if of_batch is None else pad_slices(values, of_batch)
            yield {name: tf.constant(array) for name, array in batch.items()}

    return Iterations(batches)


def pad_slices(values: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Pad the slices of an array between ``splits`` to the longest."""
    lengths = np.diff(splits)
    batch = np.zeros([len(lengths), lengths.max(), *values.shape[1:]], values.dtype)
    if batch.ndim == 2 and batch.shape[1] <= SHORT:
        batch[np.arange(batch.shape[1]) < lengths[:, np.newaxis]] = values[splits[0] : splits[-1]]
        return batch
    for row, begin, end in zip(batch, splits.tolist(), splits[1:].tolist()):
        row[: end - begin] = values[begin:end]
    return batch


# -- other libraries --------------------------------------------------------------------------------------------------


def torch_loader(workload: Workload, size: int) -> Iterable[Any]:
    """A DataLoader without worker processes, its batches padded by ``pad_sequence``."""

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for name in examples[0]:
            items = [example[name] for example in examples]
            if name in workload.padded:
                tensors = [*map(torch.from_numpy, items)]
                batch[name] = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
            else:  # PyTorch has no strings
                batch[name] = items if isinstance(items[0], bytes) else torch.from_numpy(np.stack(items))
        return batch

    return torch.utils.data.DataLoader(workload.examples, batch_size=size, collate_fn=collate)


def grain_dataset(workload: Workload, size: int, source: Any = None) -> Iterable[Any]:
    """A dataset of grain with its own number of threads, 16, and batches padded by hand."""
    examples = grain.MapDataset.source(workload.examples if source is None else source)
    return examples.batch(size, batch_fn=functools.partial(pad_examples, workload.padded)).to_iter_dataset()


def of_other_libraries(workload: Workload, size: int) -> dict[str, Callable[[], Iterable[Any]]]:
    """The contenders of the libraries that are installed."""
    found: dict[str, Callable[[], Iterable[Any]]] = {}
    if torch is not None:
        found["torch DataLoader"] = functools.partial(torch_loader, workload, size)
    if grain is not None:
        found["grain"] = functools.partial(grain_dataset, workload, size)
    return found
