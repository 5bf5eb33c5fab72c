"""Config: the checked arguments of PaddedBatches, and the padded sizes that they define."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distpad import errors
from distpad.data.schema import Pad
from distpad.data.structure import Name
from distpad.padding.buckets import Buckets

_NAME = "PaddedBatches"
_AUTO = Buckets.auto()
_NEAR = 2  # axes share a boundary if theirs are at most this many apart


@dataclass(frozen=True)
class Config:
    """How batches are made, the same on all workers.

    Attributes:
      tokens: from losses to the features whose valid positions they count; a single loss has the name None.
      weights: from weighted losses to the features that hold their weights.
      buckets: from padded features to their buckets; "auto"; or None for the longest length.
      lookahead: micro-batches in the longest window, a multiple of ``accumulation_steps``.
      num_parallel_reads: threads that read examples; it may differ between workers, as the time limits may.
      warn_after_s, timeout_s: time limits.
    """

    batch_size: int | None
    padding: Mapping[Name, Pad]
    tokens: Mapping[Any, Name]
    weights: Mapping[Any, Name]
    buckets: Mapping[Name, Buckets] | str | None
    lookahead: int
    accumulation_steps: int
    num_parallel_reads: int
    drop_remainder: bool
    replicated: bool
    warn_after_s: float
    timeout_s: float

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

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Raise ValueError if the size of an axis is above the last boundary of its buckets."""
        for buckets, (name, axis), size in zip(self.axis_buckets or (), self.axes, sizes):
            try:
                buckets.index(size)
            except ValueError as error:
                raise ValueError(f"{_NAME}: axis {axis} of {name!r}: {error}") from None

    def as_json(self) -> dict[str, Any]:
        """The configuration that is compared between workers."""
        return {
            "batch_size": self.batch_size,
            "padding": {
                str(name): {"axis": list(pad.axes), "value": str(pad.value), "side": pad.side}
                | {"max_length": str(pad.max_length), "truncating": pad.truncating}
                for name, pad in self.padding.items()
            },
            "tokens": {str(loss): str(name) for loss, name in self.tokens.items()},
            "weights": {str(loss): str(name) for loss, name in self.weights.items()},
            "buckets": {str(name): repr(buckets) for name, buckets in self.buckets.items()}
            if isinstance(self.buckets, Mapping)
            else self.buckets,
            "lookahead": self.lookahead,
            "accumulation_steps": self.accumulation_steps,
            "drop_remainder": self.drop_remainder,
            "replicated": self.replicated,
        }


def checked(
    *,
    batch_size: Any,
    padding: Any,
    tokens: Any,
    weights: Any,
    buckets: Any,
    lookahead: Any,
    accumulation_steps: Any,
    num_parallel_reads: Any,
    drop_remainder: Any,
    replicated: Any,
    warn_after_s: float,
    timeout_s: float,
) -> Config:
    """Check the arguments of PaddedBatches. Raises ValueError or TypeError for the first argument that is wrong."""
    if batch_size is not None:
        batch_size = errors.integer(_NAME, "batch_size", batch_size, least=1)
    accumulation_steps = errors.integer(_NAME, "accumulation_steps", accumulation_steps, least=1)
    lookahead = errors.integer(_NAME, "lookahead", lookahead, least=1)
    for name, seconds in (("warn_after_s", warn_after_s), ("timeout_s", timeout_s)):
        if not errors.number(_NAME, name, seconds) > 0:
            raise ValueError(errors.sentence(_NAME, name, seconds, "above 0 seconds"))
    padding = _checked_padding(padding)
    tokens = _checked_tokens(tokens, padding)
    return Config(
        batch_size=batch_size,
        padding=padding,
        tokens=tokens,
        weights=_checked_weights(weights, tokens, padding),
        buckets=_checked_buckets(buckets, padding),
        lookahead=-(-lookahead // accumulation_steps) * accumulation_steps,
        accumulation_steps=accumulation_steps,
        num_parallel_reads=errors.integer(_NAME, "num_parallel_reads", num_parallel_reads, least=1),
        drop_remainder=bool(drop_remainder),
        replicated=bool(replicated),
        warn_after_s=float(warn_after_s),
        timeout_s=float(timeout_s),
    )


def _checked_padding(padding: Any) -> dict[Name, Pad]:
    if not isinstance(padding, Mapping) or not padding:
        raise TypeError(errors.sentence(_NAME, "padding", repr(padding), "a mapping from features to distpad.Pad"))
    for name, pad in padding.items():
        if not isinstance(pad, Pad):
            raise TypeError(errors.sentence(_NAME, f"padding[{name!r}]", repr(pad), "a distpad.Pad"))
    return {name: padding[name] for name in sorted(padding, key=str)}


def _checked_tokens(tokens: Any, padding: Mapping[Name, Pad]) -> dict[Any, Name]:
    losses = dict(tokens) if isinstance(tokens, Mapping) else {None: tokens}
    if not losses:
        raise ValueError(errors.sentence(_NAME, "tokens", "empty", "at least one loss"))
    if isinstance(tokens, Mapping) and None in losses:
        raise ValueError(errors.sentence(_NAME, "tokens", repr(tokens), "names of losses; for a single one, a feature"))
    for name in losses.values():
        _check_name("tokens", name)
        if name not in padding:
            raise ValueError(errors.sentence(_NAME, "tokens", repr(name), f"a padded feature: {list(padding)}"))
        axes = sorted(padding[name].axes)
        if len(axes) > 1 and axes != [*range(len(axes))]:
            found = f"{name!r}, with ragged axes {axes}"
            raise ValueError(errors.sentence(_NAME, "tokens", found, "a feature whose leading axes are ragged"))
    return losses


def _checked_weights(weights: Any, tokens: Mapping[Any, Name], padding: Mapping[Name, Pad]) -> dict[Any, Name]:
    if weights is None:
        return {}
    weights = dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(tokens, weights)
    unknown = [loss for loss in weights if loss not in tokens]
    if unknown:
        raise ValueError(errors.sentence(_NAME, "weights", f"for {unknown}", f"losses of tokens: {list(tokens)}"))
    for loss, name in weights.items():
        _check_name("weights", name)
        counted = padding[tokens[loss]]
        same = ("side", "max_length", "truncating") + ("axes",) * (counted.side == "pre")
        for option in same if name in padding else ():
            given, wanted = getattr(padding[name], option), getattr(counted, option)
            if given != wanted:
                where, rule = f"{option} of weights {name!r}", f"{wanted!r}, as of {tokens[loss]!r}"
                raise ValueError(errors.sentence(_NAME, where, repr(given), rule))
    return weights


def _check_name(argument: str, name: Any) -> None:
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        rule = "a feature's name, or a mapping from losses to features"
        raise TypeError(errors.sentence(_NAME, argument, repr(name), rule))


def _checked_buckets(buckets: Any, padding: Mapping[Name, Pad]) -> dict[Name, Buckets] | str | None:
    if buckets is None:
        return None
    if isinstance(buckets, str):
        errors.choice(_NAME, "buckets", buckets, ("auto",))
        return buckets
    buckets = dict(buckets) if isinstance(buckets, Mapping) else dict.fromkeys(padding, buckets)
    for name, given in buckets.items():
        if not isinstance(given, Buckets):
            kinds = "a distpad.Buckets, a mapping to them, 'auto' or None"
            raise TypeError(errors.sentence(_NAME, "buckets", repr(given), kinds))
        if name not in padding:
            raise ValueError(errors.sentence(_NAME, "buckets", f"for {name!r}", f"padded features: {list(padding)}"))
    missing = [name for name in padding if name not in buckets]
    if missing:
        raise ValueError(errors.sentence(_NAME, "buckets", f"without {missing}", "one for each padded feature"))
    boundaries = {name: len(given.boundaries) for name, given in buckets.items()}
    if len(set(boundaries.values())) > 1:
        remedy = "A step uses the same boundary of each."
        raise ValueError(
            errors.sentence(_NAME, "buckets", f"with boundaries {boundaries}", "equally many for each", remedy)
        )
    return buckets
