"""LengthSampler: which examples each global step trains on, the same on all workers without a word between them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from distpad import errors
from distpad.padding.buckets import Buckets

_NAME = "LengthSampler"
_PLANS = 2  # epochs that are kept: the one that runs, and the one that is read ahead


class LengthSampler:
    """Plan epochs of batches of examples of similar length, from the lengths and a seed alone.

    Every worker computes the same plan, so that none has to be exchanged, and a step's examples do not depend on how
    many workers deal them out: training is the same on 1, 2 or 8 of them. Every example comes exactly once an epoch.

    Args:
      lengths: ``[examples]`` integers from 0 on.
      global_batch_size: examples of a step, over all replicas of all workers.
      max_tokens: instead, positions of a step with their padding, over all replicas: a step has as many rows as its
        boundary allows, at least one.
      buckets: what lengths are padded to; without it, a step is padded to its longest example. With ``max_tokens`` all
        steps of one boundary have the same shape.
      shuffle: False: examples and steps in the order of the data set, as an evaluation wants them.
      seed: with the epoch, all that the plan depends on.
      randomness: from 0, sorted by boundary (equal ones at random: they pad alike) or without buckets by length, to 1,
        fully shuffled. In between, an example's place is ``(1 - randomness) * rank + randomness * chance``.

    Raises:
      ValueError: neither or both of ``global_batch_size`` and ``max_tokens``; a number out of range; a length above the
        buckets or, with its padding, above ``max_tokens``. TypeError: no integers.

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
        self.lengths = _checked_lengths(lengths)
        if (global_batch_size is None) == (max_tokens is None):
            found = "both" if max_tokens is not None else "none of them"
            raise ValueError(_sentence("global_batch_size, max_tokens", found, "one of them"))
        given = {"global_batch_size": global_batch_size, "max_tokens": max_tokens}
        sizes = {name: errors.integer(_NAME, name, size, least=1) for name, size in given.items() if size is not None}
        self.global_batch_size, self.max_tokens = sizes.get("global_batch_size"), sizes.get("max_tokens")
        self.seed = errors.integer(_NAME, "seed", seed, least=0)
        if not isinstance(buckets, (Buckets, type(None))):
            raise TypeError(_sentence("buckets", repr(buckets), "a distpad.Buckets"))
        self.randomness = errors.number(_NAME, "randomness", randomness)
        if not 0 <= self.randomness <= 1:
            raise ValueError(_sentence("randomness", randomness, "from 0 to 1"))
        self.buckets = buckets
        self.shuffle = bool(shuffle)
        distinct, where = np.unique(self.lengths, return_inverse=True)
        boundaries = [buckets(int(length)) if buckets else int(length) for length in distinct]
        self._boundaries = np.array(boundaries, np.int64)[where.reshape(-1)]  # of each example
        if self.max_tokens is not None and len(self.lengths) and self._boundaries.max() > self.max_tokens:
            longest = int(self._boundaries.argmax())
            found = f"Example {longest} has {self.lengths[longest]} positions, {self._boundaries[longest]} padded."
            raise ValueError(_sentence("max_tokens", self.max_tokens, f"at least {self._boundaries.max()}", found))
        self._plans: dict[int, tuple[np.ndarray, ...]] = {}  # the last that were asked for

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The global steps of an epoch: for each the indices of its examples, ``[rows]`` int64, without filling.

        Raises ValueError for a negative epoch.
        """
        epoch = errors.integer(_NAME, "epoch", epoch, least=0)
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._make_plan(epoch)
            kept = [*self._plans.items()][1 - _PLANS :]  # replaced, not changed: a reader asks, too, in its thread
            self._plans = dict([*kept, (epoch, plan)])
        return list(plan)

    def shard(self, worker_index: int, num_workers: int) -> Shard:
        """One worker's part of all epochs; as many shards of one sampler as one likes."""
        return Shard(self, worker_index, num_workers)

    def rows(self, step: np.ndarray, num_workers: int) -> int:
        """The rows that each worker gets of a step: as many on all, so that the shape depends on the boundary alone."""
        return -(-self._rows_of(int(self._boundaries[step].max())) // num_workers)

    def fingerprint(self) -> str:
        """What a saved position belongs to: the same lengths and options give the same plans."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:  # once: a job saves often, and has many lengths
        options = (self.global_batch_size, self.max_tokens, self.buckets, self.shuffle, self.seed, self.randomness)
        return hashlib.sha256(repr(options).encode() + self.lengths.tobytes()).hexdigest()[:16]

    def _rows_of(self, boundary: int) -> int:
        """How many examples a global step of this padded length has room for."""
        if self.max_tokens is None:
            return self.global_batch_size or 0  # one of the two is given
        return self.max_tokens // max(boundary, 1)

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, ...]:
        random = np.random.default_rng((self.seed, epoch))
        order = self._order(random)
        begins, begin = [], 0
        while begin < len(order):
            begins.append(begin)
            begin += self._rows_at(order, begin)
        steps = np.split(order, begins[1:]) if begins else []
        if self.shuffle:
            steps = [steps[place] for place in random.permutation(len(steps))]
        for step in steps:
            step.setflags(write=False)  # all shards are dealt the same
        return tuple(steps)

    def _order(self, random: np.random.Generator) -> np.ndarray:
        """The examples in the order in which steps take them."""
        count = len(self.lengths)
        if not self.shuffle:
            return np.arange(count)
        shuffled = random.permutation(count)  # first, so that equal boundaries come at random
        by_boundary = shuffled[np.argsort(self._boundaries[shuffled], kind="stable")]
        chance = random.random(count)
        place = (1 - self.randomness) * np.arange(count) / max(count, 1) + self.randomness * chance
        return by_boundary[np.argsort(place, kind="stable")]

    def _rows_at(self, order: np.ndarray, begin: int) -> int:
        """How many examples from a place on fit into one step, the longest of them deciding."""
        if self.global_batch_size:
            return self.global_batch_size
        rows = self._rows_of(int(self._boundaries[order[begin]]))
        while True:  # a longer boundary has room for fewer: it ends
            needed = self._rows_of(int(self._boundaries[order[begin : begin + rows]].max()))
            if needed >= rows:
                return rows
            rows = needed


class Shard:
    """One worker's index batches: an epoch, then the next when it is iterated again.

    Each batch is ``[rows]`` int64, places in the data set, -1 being filling behind them; ``rows`` is the same on all
    workers. The longest and the shortest examples of a step are dealt out in turns, so that all workers pad as little
    and have as much to do. What is saved counts the batches that were handed out.

    >>> shard = LengthSampler([5, 1, 4], global_batch_size=2, shuffle=False).shard(worker_index=1, num_workers=2)
    >>> [batch.tolist() for batch in shard]
    [[1], [-1]]
    """

    def __init__(self, sampler: LengthSampler, worker_index: int, num_workers: int) -> None:
        errors.integer(_NAME, "num_workers", num_workers, least=1)
        if errors.integer(_NAME, "worker_index", worker_index, least=0) >= num_workers:
            raise ValueError(_sentence("worker_index", worker_index, f"from 0 to {num_workers - 1}"))
        self.sampler = sampler
        self.worker_index = worker_index
        self.num_workers = num_workers
        self._epoch = self._step = 0
        self._begun = False

    def __len__(self) -> int:
        """The steps of the epoch that runs, or is to begin."""
        return len(self.sampler.plan(self._epoch))

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._begun:
            self.set_epoch(self._epoch + 1)
        self._begun = True
        steps = self.sampler.plan(self._epoch)
        for place in range(self._step, len(steps)):
            self._step = place + 1  # before it is handed out: who saves while training on it has consumed it
            yield self._mine(steps[place])

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch, from its first step, when iterated next."""
        self._epoch, self._step, self._begun = errors.integer(_NAME, "epoch", epoch, least=0), 0, False

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, for JSON: it holds for any number of workers."""
        return {"epoch": self._epoch, "step": self._step, "sampler": self.sampler.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the last step that was handed out, on this worker and with this many.

        Raises:
          ValueError: the state of a sampler with other lengths or options, or no state.
        """
        if not isinstance(state, dict):
            raise TypeError(_sentence("state", repr(state), "what state_dict returned"))
        missing = {"epoch", "step", "sampler"} - set(state)
        if missing:
            raise ValueError(_sentence("state", f"without {sorted(missing)}", "what state_dict returned"))
        if state["sampler"] != self.sampler.fingerprint():
            raise ValueError(
                _sentence("state", "of another sampler", "one with the same lengths, options and seed as this")
            )
        self.set_epoch(state["epoch"])
        self._step = errors.integer(_NAME, "state's step", state["step"], least=0)
        if self._step > len(self):
            raise ValueError(_sentence("state", f"at step {state['step']}", f"from 0 to {len(self)}"))
        if self._step == len(self):
            self.set_epoch(self._epoch + 1)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """This worker's index batch of one step, wherever the shard stands."""
        return self._mine(self.sampler.plan(epoch)[step])

    def _mine(self, step: np.ndarray) -> np.ndarray:
        """This worker's rows: the examples, longest first, are dealt out there and back."""
        longest_first = step[np.argsort(-self.sampler.lengths[step], kind="stable")]
        place = np.arange(len(step))
        turn, at = np.divmod(place, self.num_workers)
        taker = np.where(turn % 2, self.num_workers - 1 - at, at)
        mine = longest_first[taker == self.worker_index]
        rows = self.sampler.rows(step, self.num_workers)
        return np.concatenate([mine, np.full(rows - len(mine), -1, np.int64)])


def _checked_lengths(lengths: Any) -> np.ndarray:
    given = np.asarray(lengths)
    if given.ndim != 1:
        raise ValueError(_sentence("lengths", f"of shape {given.shape}", "[examples]"))
    if given.size and given.dtype.kind not in "iu":
        raise TypeError(_sentence("lengths", f"of {given.dtype}", "integers"))
    for length in [given.min(), given.max()] if given.size else []:
        if not 0 <= int(length) < 2**62:
            raise ValueError(_sentence("lengths", int(length), "at least 0, and below 2**62"))
    lengths = given.astype(np.int64)  # a copy
    lengths.setflags(write=False)  # plans and saved positions are those of these
    return lengths


def _sentence(argument: str, value: Any, rule: str, *more: str) -> str:
    return errors.sentence(_NAME, argument, value, rule, *more)
