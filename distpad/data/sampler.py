"""LengthSampler: plans the examples of each global step, the same on all workers, without communication."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distpad import errors
from distpad.padding.buckets import Buckets, read_lengths

_NAME = "LengthSampler"
_require = functools.partial(errors.require, "LengthSampler")
MOST_ROWS = 2**24  # of a batch, so that its indices and shapes are cheap before its data are known
_PLANS = 2  # kept plans: of the running epoch, and of the epoch that is read ahead


class Plan(NamedTuple):
    """The global steps of an epoch.

    Attributes:
      steps: the example indices of each step, ``[rows]`` int64.
      longest_first: the same, from the longest to the shortest example.
      longest: the length of the longest example of each step.
      rows: the rows of each step over all replicas, filler rows included: the shape depends on the boundary alone.
    """

    steps: list[np.ndarray]
    longest_first: list[np.ndarray]
    longest: list[int]
    rows: list[int]

    def deal(self, step: int, num_workers: int, workers: Sequence[int]) -> list[np.ndarray]:
        """Return the rows of some workers of a step, filled up with -1.

        The workers take the examples in turns, longest first, in alternating directions.
        """
        examples, dealt = self.longest_first[step], []
        for worker in workers:
            mine = np.full(-(-self.rows[step] // num_workers), -1, np.int64)
            for turn, first in enumerate((worker, 2 * num_workers - 1 - worker)):
                taken = examples[first :: 2 * num_workers]
                mine[turn::2][: len(taken)] = taken
            dealt.append(mine)
        return dealt


class LengthSampler:
    """Plan epochs whose steps have examples of similar length, from the lengths and a seed.

    Every worker computes the same plan without communication. A step's examples do not depend on the number of workers:
    training is the same on 1, 2 or 8 workers. Every example comes exactly once per epoch.

    Args:
      lengths: ``[examples]`` non-negative integers.
      global_batch_size: examples in a step, over all replicas of all workers.
      max_tokens: alternatively, positions in a step over all replicas, padding included: a step has as many rows as its
        boundary allows, at least one.
      buckets: the padded lengths; without them, a step is padded to its longest example. With ``max_tokens``, all steps
        of one boundary have the same shape.
      shuffle: False keeps examples and steps in the order of the data set, for evaluation.
      seed: seed of the plans, together with the number of the epoch.
      randomness: from 0 (sorted by boundary, in random order within a boundary; without buckets, sorted by length) to 1
        (shuffled). Examples are sorted by ``(1 - randomness) * rank + randomness * chance``.

    Raises:
      ValueError: neither or both of ``global_batch_size`` and ``max_tokens``; a number out of range; a length above the
        last boundary, or whose padded length is above ``max_tokens``.
      TypeError: not an integer, or not buckets.

    Source: grouping by length and token budgets as in fairseq (M. Ott et al., NAACL 2019).

    >>> sampler = LengthSampler([5, 1, 4, 2], global_batch_size=2, randomness=0.0)
    >>> sorted(sorted(step.tolist()) for step in sampler.plan(epoch=0))
    [[0, 2], [1, 3]]
    """

    def __init__(
        self,
        lengths: Any,
        *,
        global_batch_size: int | None = None,
        max_tokens: int | None = None,
        buckets: Buckets | None = None,
        shuffle: bool = True,
        seed: int = 0,
        randomness: float = 0.05,
    ) -> None:
        self.lengths = read_lengths(_NAME, lengths)
        _require(self.lengths.ndim == 1, "lengths", f"of shape {self.lengths.shape}", "[examples]")
        self.lengths.setflags(write=False)  # plans and saved positions depend on them
        found, is_one = "neither" if max_tokens is None else "both", (global_batch_size is None) != (max_tokens is None)
        _require(is_one, "global_batch_size, max_tokens", found, "one of them")
        given = {"global_batch_size": global_batch_size, "max_tokens": max_tokens}
        limits = {"global_batch_size": MOST_ROWS, "max_tokens": 2**62}
        sizes = {
            name: errors.integer(_NAME, name, size, least=1, most=limits[name])
            for name, size in given.items()
            if size is not None
        }
        self.global_batch_size, self.max_tokens = sizes.get("global_batch_size"), sizes.get("max_tokens")
        self.seed = errors.integer(_NAME, "seed", seed, least=0)
        is_buckets = isinstance(buckets, (Buckets, type(None)))
        _require(is_buckets, "buckets", errors.shown(buckets), "a distpad.Buckets", error=TypeError)
        self.randomness = errors.number(_NAME, "randomness", randomness)
        _require(0 <= self.randomness <= 1, "randomness", randomness, "from 0 to 1")
        self.buckets = buckets
        self.shuffle = errors.flag(_NAME, "shuffle", shuffle)
        distinct, where = np.unique(self.lengths, return_inverse=True)
        boundaries = [buckets(int(length)) if buckets else int(length) for length in distinct]
        self._boundaries = np.array(boundaries, np.int64)[where.reshape(-1)]  # of each example
        if self.max_tokens is not None and len(self.lengths) and self._boundaries.max() > self.max_tokens:
            longest = int(self._boundaries.argmax())
            found = f"Example {longest} has {self.lengths[longest]} positions, {self._boundaries[longest]} padded."
            _require(False, "max_tokens", self.max_tokens, f"at least {self._boundaries.max()}", found)
        self._plans: dict[int, Plan] = {}  # the latest, by epoch

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Return the global steps of an epoch: for each the indices of its examples, ``[rows]`` int64, without -1.

        Raises ValueError for a negative epoch.
        """
        return [*self.of_epoch(epoch).steps]

    def of_epoch(self, epoch: int) -> Plan:
        """Return the plan of an epoch, and what the pipeline asks of each of its steps."""
        epoch = errors.integer(_NAME, "epoch", epoch, least=0)
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._make_plan(epoch)
            kept = [*self._plans.items()][1 - _PLANS :]
            self._plans = dict([*kept, (epoch, plan)])  # a new dict, since the reader's thread may read the old one
        return plan

    def shard(self, worker_index: int, num_workers: int) -> Shard:
        """Return one worker's part of all epochs. A sampler has any number of shards."""
        return Shard(self, worker_index, num_workers)

    def fingerprint(self) -> str:
        """A hash of the lengths and options, which define the plans: a saved position holds it."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:  # cached, since a job saves often and has many lengths
        options = (self.global_batch_size, self.max_tokens, self.buckets, self.shuffle, self.seed, self.randomness)
        return hashlib.sha256(repr(options).encode() + self.lengths.tobytes()).hexdigest()[:16]

    def _rows_of(self, boundary: int) -> int:
        """The number of examples in a global step of this padded length."""
        if self.max_tokens is None:
            return self.global_batch_size or 0  # one of the two is set
        return min(self.max_tokens // max(boundary, 1), MOST_ROWS)

    def _make_plan(self, epoch: int) -> Plan:
        random = np.random.default_rng((self.seed, epoch))
        order = self._order(random)
        begins, begin = [], 0
        while begin < len(order):
            begins.append(begin)
            begin += self._rows_at(order, begin)
        steps = np.split(order, begins[1:]) if begins else []
        if self.shuffle:
            steps = [steps[number] for number in random.permutation(len(steps))]
        examples = np.concatenate(steps) if steps else np.zeros(0, np.int64)
        examples.setflags(write=False)  # all shards share it
        ends = np.cumsum([0, *map(len, steps)])
        numbers = np.repeat(np.arange(len(steps)), np.diff(ends))
        by_length = examples[np.lexsort([-self.lengths[examples], numbers])]
        longest = by_length[ends[:-1]]
        rows = [self._rows_of(boundary) for boundary in self._boundaries[longest].tolist()]
        unsorted, ordered = (np.split(each, ends[1:-1]) if steps else [] for each in (examples, by_length))
        return Plan(unsorted, ordered, self.lengths[longest].tolist(), rows)

    def _order(self, random: np.random.Generator) -> np.ndarray:
        """The examples in the order of the steps, before the steps are shuffled."""
        count = len(self.lengths)
        if not self.shuffle:
            return np.arange(count)
        shuffled = random.permutation(count)  # first, for a random order within a boundary
        by_boundary = shuffled[np.argsort(self._boundaries[shuffled], kind="stable")]
        chance = random.random(count)
        key = (1 - self.randomness) * np.arange(count) / max(count, 1) + self.randomness * chance
        return by_boundary[np.argsort(key, kind="stable")]

    def _rows_at(self, order: np.ndarray, begin: int) -> int:
        """The number of rows of the step that begins at an index of the order; its longest example limits them."""
        if self.global_batch_size:
            return self.global_batch_size
        rows = self._rows_of(int(self._boundaries[order[begin]]))
        while True:  # rows decrease in each iteration
            needed = self._rows_of(int(self._boundaries[order[begin : begin + rows]].max()))
            if needed >= rows:
                return rows
            rows = needed


class Shard:
    """One worker's index batches. Each iteration is the next epoch.

    Each batch is ``[rows]`` int64: example indices, then -1 for filler rows. ``rows`` is the same on all workers. The
    workers take turns with the longest and the shortest examples of a step, which balances padding and work. The state
    counts the batches that were yielded.

    >>> shard = LengthSampler([5, 1, 4], global_batch_size=2, shuffle=False).shard(worker_index=1, num_workers=2)
    >>> [batch.tolist() for batch in shard]
    [[1], [-1]]
    """

    def __init__(self, sampler: LengthSampler, worker_index: int, num_workers: int) -> None:
        errors.integer(_NAME, "num_workers", num_workers, least=1)
        errors.integer(_NAME, "worker_index", worker_index, least=0)
        _require(worker_index < num_workers, "worker_index", worker_index, f"from 0 to {num_workers - 1}")
        self.sampler = sampler
        self.worker_index = worker_index
        self.num_workers = num_workers
        self._epoch = self._step = 0
        self._begun = False

    def __len__(self) -> int:
        """The steps of the running or the next epoch."""
        return len(self.sampler.of_epoch(self._epoch).steps)

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._begun:
            self.set_epoch(self._epoch + 1)
        self._begun = True
        plan = self.sampler.of_epoch(self._epoch)
        for step in range(self._step, len(plan.steps)):
            self._step = step + 1  # before it is yielded: state saved while training on it includes it
            yield plan.deal(step, self.num_workers, [self.worker_index])[0]

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration begin this epoch, at its first step."""
        self._epoch, self._step, self._begun = errors.integer(_NAME, "epoch", epoch, least=0), 0, False

    def state_dict(self) -> dict[str, Any]:
        """Return the position as a dict for JSON, valid for any number of workers."""
        return {"epoch": self._epoch, "step": self._step, "sampler": self.sampler.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last yielded step, on this shard's worker index and number of workers.

        Raises:
          TypeError, ValueError: not a state, or the state of a sampler with other lengths or options.
        """
        check_state(_NAME, state, {"epoch", "step", "sampler"})
        rule = "one with the same lengths, options and seed as this"
        _require(state["sampler"] == self.sampler.fingerprint(), "state", "of another sampler", rule)
        self.set_epoch(state["epoch"])
        self._step = errors.integer(_NAME, "state's step", state["step"], least=0)
        _require(self._step <= len(self), "state", f"at step {self._step}", f"from 0 to {len(self)}")
        if self._step == len(self):
            self.set_epoch(self._epoch + 1)


def check_state(function: str, state: Any, keys: set[str]) -> None:
    """Raise TypeError or ValueError for what is not a saved state with these keys."""
    rule = "a result of state_dict"
    errors.require(function, isinstance(state, Mapping), "state", errors.shown(state), rule, error=TypeError)
    errors.require(function, keys <= {*state}, "state", f"without {sorted(keys - {*state})}", rule)
