"""Config: the checked arguments of PaddedBatches, and the padded sizes that they define."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distpad import errors
from distpad.data import sampler
from distpad.data.schema import Pad
from distpad.data.structure import Name
from distpad.padding.buckets import Buckets

_NAME = "PaddedBatches"
_AUTO = Buckets.auto()
_FEW = 10  # examples that an epoch may skip whatever the fraction
_MOST = {"batch_size": sampler.MOST_ROWS, "accumulation_steps": 2**16, "num_parallel_reads": 2**10}
_NEAR = 2  # axes share a boundary if theirs are at most this many apart


@dataclass
class Config:
    """How batches are made, the same on all workers: the arguments of PaddedBatches, checked and normalised.

    Attributes:
      tokens: from losses to the features whose valid positions they count; a single loss has the name None.
      weights: from weighted losses to the features that hold their weights.
      buckets: from padded features to their buckets; "auto"; or None for the longest length.
      lookahead: micro-batches in the longest window, a multiple of ``accumulation_steps``.
      num_parallel_reads: threads that read examples; it may differ between workers, as the time limits may.
      warn_after_s, timeout_s: time limits.
      on_error: "raise" or "skip" examples.
      max_skipped: how many examples an epoch may skip: a number, or a fraction below 1.

    Raises: ValueError, TypeError: the first argument that is wrong.
    """

    batch_size: int | None
    padding: Mapping[Name, Pad]
    tokens: Any
    weights: Any
    buckets: Mapping[Name, Buckets] | str | None
    lookahead: int
    accumulation_steps: int
    num_parallel_reads: int
    drop_remainder: bool
    replicated: bool
    warn_after_s: float
    timeout_s: float
    on_error: str = "raise"
    max_skipped: float = 0.01

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation_steps", "lookahead", "num_parallel_reads"):
            given = getattr(self, name)
            if name != "batch_size" or given is not None:
                setattr(self, name, errors.integer(_NAME, name, given, least=1, most=_MOST.get(name, 2**62)))
        for name in ("warn_after_s", "timeout_s"):
            seconds = errors.number(_NAME, name, getattr(self, name))
            errors.require(_NAME, 0 < seconds <= 1e9, name, seconds, "above 0 seconds, and at most 1e9")
            setattr(self, name, seconds)
        errors.choice(_NAME, "on_error", self.on_error, ("raise", "skip"))
        self.max_skipped = errors.number(_NAME, "max_skipped", self.max_skipped)
        rule = "a number of examples, or a fraction below 1"
        errors.require(_NAME, self.max_skipped >= 0, "max_skipped", self.max_skipped, rule)
        for name in ("drop_remainder", "replicated"):
            setattr(self, name, errors.flag(_NAME, name, getattr(self, name)))
        self.lookahead = -(-self.lookahead // self.accumulation_steps) * self.accumulation_steps
        self.padding = _checked_padding(self.padding)
        self.tokens = _checked_tokens(self.tokens, self.padding)
        self.weights = _checked_weights(self.weights, self.tokens, self.padding)
        self.buckets = _checked_buckets(self.buckets, self.padding)

    @functools.cached_property
    def axes(self) -> list[tuple[Name, int]]:
        """All ragged axes, in the order of their sizes in a report."""
        return [(name, axis) for name, pad in self.padding.items() for axis in pad.axes]

    @functools.cached_property
    def axis_buckets(self) -> list[Buckets] | None:
        """The buckets of each ragged axis, if the user gave buckets."""
        return [self.buckets[name] for name, _ in self.axes] if isinstance(self.buckets, Mapping) else None

    @functools.cached_property
    def counted_axes(self) -> dict[Name, list[int]]:
        """The axes of an example that span the positions of each counted feature."""
        return {name: sorted(self.padding[name].axes) for name in self.tokens.values()}

    @property
    def skips(self) -> bool:
        """Whether examples that cannot be read or do not fit are skipped."""
        return self.on_error == "skip"

    def may_skip(self, count: int) -> int:
        """How many of the first ``count`` examples of an epoch, over all workers, may be skipped."""
        most = self.max_skipped
        return int(most) if most >= 1 or not most else max(_FEW, int(most * count))

    @functools.cached_property
    def limits(self) -> list[int | None]:
        """The longest allowed size of each ragged axis."""
        return [pad.max_length if axis == pad.axes[0] else None for pad in self.padding.values() for axis in pad.axes]

    def window(self, number: int) -> tuple[int, int]:
        """The first step of a window, and its number of steps: 1, 2, 4 ... groups, up to ``lookahead`` steps.

        So the first batch of an epoch does not wait until a whole window is read.
        """
        begin, size = 0, self.accumulation_steps
        while number and size < self.lookahead:
            begin, size, number = begin + size, min(2 * size, self.lookahead), number - 1
        return begin + number * size, size

    def padded_sizes(self, agreed: tuple[int, ...], sampled: Buckets | None, longest: int | None) -> tuple[int, ...]:
        """Return the padded sizes of a step's ragged axes.

        With given buckets, all axes use the highest boundary index that one of them needs: there are as many shapes as
        boundaries. With "auto", axes share a boundary only if theirs are near: texts are not padded to the length of
        their recordings. No axis is padded beyond the ``max_length`` of its ``Pad``.

        Args:
          agreed: the longest size of each axis over all replicas.
          sampled: with "auto", the buckets for the lengths of a sampler.
          longest: the longest sampled length of the step.
        """
        sizes = self._boundaries(agreed, sampled, longest)
        return tuple(min(size, limit or size) for size, limit in zip(sizes, self.limits))

    def _boundaries(self, agreed: tuple[int, ...], sampled: Buckets | None, longest: int | None) -> tuple[int, ...]:
        if self.buckets is None:
            return agreed
        given = self.axis_buckets
        if given is None:
            others = [_AUTO.index(size) for size in agreed if not sampled or size != longest]
            highest = max(others, default=0)
            raised = iter([highest if highest - index <= _NEAR else index for index in others])
            return tuple(
                sampled(size) if sampled and size == longest else _AUTO.boundary(next(raised)) for size in agreed
            )
        index = max(each.index(size) for each, size in zip(given, agreed))
        return tuple(each.boundary(index) for each in given)

    def as_json(self) -> dict[str, Any]:
        """The configuration that is compared between workers."""
        mappings = ("padding", "tokens", "weights", "buckets")
        options = ("batch_size", "lookahead", "accumulation_steps", "drop_remainder", "replicated")
        compared = {name: getattr(self, name) for name in (*mappings, *options, "on_error", "max_skipped")}
        for name in mappings:
            if isinstance(compared[name], Mapping):
                compared[name] = {str(key): str(item) for key, item in compared[name].items()}
        return compared


def _checked_padding(padding: Any) -> dict[Name, Pad]:
    is_mapping = isinstance(padding, Mapping) and padding
    rule = "a mapping from features to distpad.Pad"
    errors.require(_NAME, is_mapping, "padding", errors.shown(padding), rule, error=TypeError)
    for name, pad in padding.items():
        _check_name("padding", name)
        errors.require(
            _NAME, isinstance(pad, Pad), f"padding[{name!r}]", errors.shown(pad), "a distpad.Pad", error=TypeError
        )
    return {name: padding[name] for name in sorted(padding, key=str)}


def _checked_tokens(tokens: Any, padding: Mapping[Name, Pad]) -> dict[Any, Name]:
    losses = dict(tokens) if isinstance(tokens, Mapping) else {None: tokens}
    errors.require(_NAME, losses, "tokens", "empty", "at least one loss")
    are_named = not isinstance(tokens, Mapping) or None not in losses
    errors.require(_NAME, are_named, "tokens", errors.shown(tokens), "names of losses; for a single one, a feature")
    for name in losses.values():
        _check_name("tokens", name)
        errors.require(_NAME, name in padding, "tokens", errors.shown(name), f"a padded feature: {list(padding)}")
        axes = sorted(padding[name].axes)
        found = f"{name!r}, with ragged axes {axes}"
        are_leading = len(axes) == 1 or axes == [*range(len(axes))]
        errors.require(_NAME, are_leading, "tokens", found, "a feature whose leading axes are ragged")
    return losses


def _checked_weights(weights: Any, tokens: Mapping[Any, Name], padding: Mapping[Name, Pad]) -> dict[Any, Name]:
    weights = {} if weights is None else weights if isinstance(weights, Mapping) else dict.fromkeys(tokens, weights)
    unknown = [loss for loss in weights if loss not in tokens]
    errors.require(_NAME, not unknown, "weights", f"for {unknown}", f"losses of tokens: {list(tokens)}")
    for loss, name in weights.items():
        _check_name("weights", name)
        counted = padding[tokens[loss]]
        same = ("side", "max_length", "truncating") + ("axes",) * (counted.side == "pre")
        for option in same if name in padding else ():
            given, wanted = getattr(padding[name], option), getattr(counted, option)
            rule = f"{wanted!r}, as of {tokens[loss]!r}"
            errors.require(_NAME, given == wanted, f"{option} of weights {name!r}", errors.shown(given), rule)
    return dict(weights)


def _check_name(argument: str, name: Any) -> None:
    is_name = isinstance(name, (str, int)) and not isinstance(name, bool)
    rule = "a feature's name, or a mapping from losses to features"
    errors.require(_NAME, is_name, argument, errors.shown(name), rule, error=TypeError)


def _checked_buckets(buckets: Any, padding: Mapping[Name, Pad]) -> dict[Name, Buckets] | str | None:
    if buckets is None:
        return None
    if isinstance(buckets, str):
        errors.choice(_NAME, "buckets", buckets, ("auto",))
        return buckets
    buckets = dict(buckets) if isinstance(buckets, Mapping) else dict.fromkeys(padding, buckets)
    kinds = "a distpad.Buckets, a mapping to them, 'auto' or None"
    for name, given in buckets.items():
        errors.require(_NAME, isinstance(given, Buckets), "buckets", errors.shown(given), kinds, error=TypeError)
        errors.require(_NAME, name in padding, "buckets", f"for {name!r}", f"padded features: {list(padding)}")
    missing = [name for name in padding if name not in buckets]
    errors.require(_NAME, not missing, "buckets", f"without {missing}", "one for each padded feature")
    boundaries = {name: len(given.boundaries) for name, given in buckets.items()}
    found, remedy = f"with boundaries {boundaries}", "A step uses the same boundary of each."
    errors.require(_NAME, len({*boundaries.values()}) == 1, "buckets", found, "equally many for each", remedy)
    return buckets
