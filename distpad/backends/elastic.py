"""ElasticState: training that goes on when workers are lost or join, with as many as there are then."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.backends import base, detection, horovod, local, variables

_NAME = "ElasticState"
# What an UnknownError says that comes from a collective: Horovod's own words, its operations, its transport.
_LOST = re.compile(r"Horovod has been shut down|Horovod[A-Z]|gloo")


class _Saved(NamedTuple):
    """What a commit keeps in this worker's memory."""

    values: list[np.ndarray]
    position: dict[str, Any] | None
    objects: dict[str, Any]


class ElasticState:
    """What workers of an elastic Horovod job have in common: variables, the place in the data, and plain objects.

    ``commit`` keeps a copy in memory. When a worker is lost, the others go back to their last commit, form a job of
    those that are left, and go on; when hosts come or go, all leave their loop at a commit and form a new job. Then
    whoever has trained longest tells the others, so that who joins learns all. The global batch is the sampler's,
    whatever the number of workers: so training takes the same steps as if nothing had happened, and each example is
    seen once an epoch.

        hvd.init()
        state = distpad.ElasticState([model, optimizer], batches=batches, step=0)

        @distpad.ElasticState.run
        def train(state):
            while state.step < steps:
                for batch in state.batches:  # goes on where the last commit was made
                    step(batch)
                    state.step += 1
                    if state.step % 10 == 0:
                        state.commit()

        train(state)

    Before ``train`` is called there may be no collective, since a worker that joins finds the others in theirs. What
    depends on who is rank 0, such as opening files, belongs into ``train``, which is called again after each change.
    Functions of TensorFlow may be made outside and are right for any number of workers, where distpad's own functions
    are all that asks for it; they are traced again for other shapes of a batch alone.

    A worker that joins must come within HOROVOD_GLOO_TIMEOUT_SECONDS (30, which is short for importing TensorFlow on a
    busy host). Where it does not, Horovod aborts those that wait for it, and the job ends: what is left is to start it
    again from a checkpoint.

    Without Horovod, in a single process, ``run`` calls the function and nothing more: a program runs alone as it is.

    Args:
      variables: a list of TensorFlow, Keras 2 or Keras 3 variables, and of what has ``variables``, such as models and
        optimisers. Optimisers must be built: ``optimizer.build(model.trainable_variables)``.
      batches: a ``PaddedBatches`` over ``(indexable, LengthSampler)``, or None. Its place is committed with the rest.
      backend: see ``distpad.backends.resolve``: Horovod with all its ranks, or one device.
      objects: become attributes, as ``state.step``. They are copied at each commit, and pickled to those that join.

    Attributes:
      batches: as given.
      is_alone: whether this is a single process without Horovod.

    Raises:
      ValueError: a place in ``batches`` that does not hold for other numbers of workers, since they have no sampler; an
        engine that is not elastic; a process set; a name that the state uses itself.
      TypeError: ``variables`` is no list, or one of them is neither a variable nor has any.

    Making one is no collective. Source: Horovod's elastic training (https://horovod.readthedocs.io/en/stable/elastic).

    >>> weight = tf.Variable(1.0)
    >>> state = ElasticState([weight], step=0)
    >>> state.step = 10
    >>> state.commit()
    >>> _, state.step = weight.assign(5.0), 17
    >>> state.restore()  # what Horovod calls after the loss of a worker
    >>> float(weight), state.step
    (1.0, 10)
    """

    def __init__(self, variables: Sequence[Any], *, batches: Any = None, backend: Any = None, **objects: Any) -> None:
        if not isinstance(variables, (list, tuple)):
            remedy = "Write [model, optimizer]."
            raise TypeError(errors.sentence(_NAME, "variables", type(variables).__name__, "a list", remedy))
        self._backend = _checked_backend(detection.resolve(backend, function=_NAME))
        self._tracked, self._count = list(variables), len(_flat(variables))
        self._hosts = _hosts(self._backend)
        self.is_alone = self._hosts is None
        self.batches = _checked_batches(batches)
        taken = [name for name in objects if hasattr(self, name) or name.startswith("_")]
        if taken:
            raise ValueError(errors.sentence(_NAME, "objects", f"with {taken}", "names that the state has no use for"))
        self._names = tuple(objects)
        self._set_objects(objects)
        self._age = 0  # commits in the life of what is held, on whichever workers
        self.save()

    @staticmethod
    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate the function that trains: it is called with the state, and again after each change of workers.

        As Horovod's own ``hvd.elastic.run``, which takes the loss of a worker for the end of training where the
        collective that failed has a name of its own or reduces a group: it returns None, as if all were done.

        Args:
          function: takes the state, and what else it is called with.

        Returns:
          A function that returns what the last call returns. Collective among workers.

        >>> train = ElasticState.run(lambda state, rate: state.step * rate)
        >>> train(ElasticState([], step=3), 2)
        6
        """

        @functools.wraps(function)
        def elastic(state: ElasticState, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(state, ElasticState):
                raise TypeError(errors.sentence("run", "state", type(state).__name__, "a distpad.ElasticState"))
            if state.is_alone:
                return function(state, *args, **kwargs)
            module = _horovod_elastic().elastic

            def recovering(*given: Any, **named: Any) -> Any:
                with _lost_peers():
                    return function(*given, **named)

            return module.run_fn(recovering, _re_form)(state, *args, **kwargs)

        return elastic

    # -- what the function that trains calls --------------------------------------------------------------------------

    def commit(self) -> None:
        """Keep what is so now, and leave the loop where hosts have come or gone. All workers call it at the same step.

        Costs a copy of the variables to host memory, and what ``check_host_updates`` costs.

        Raises ValueError where there are more or fewer variables than when the state was made.
        """
        self.save()
        self._age += 1
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Leave the loop, by Horovod's HostsUpdatedInterrupt, where hosts have come or gone; nothing is lost by it.

        All workers call it at the same step. Collective: two small broadcasts.
        """
        if self.is_alone:
            return
        try:
            with _lost_peers():
                self._hosts.check_host_updates()
        except RuntimeError as interrupt:
            if hasattr(interrupt, "skip_sync"):
                # Horovod would skip it where hosts went alone; but others may have come since, and would wait for it.
                interrupt.skip_sync = False
                self._move_to(self._position())  # ends the threads that read ahead, for another number of workers
            raise

    def save(self) -> None:
        """Keep what is so now. No collective."""
        values = [variable.numpy() for variable in self._variables()]
        self._saved = _Saved(values, self._position(), copy.deepcopy(self._objects()))

    # -- what Horovod's loop calls ------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Go back to what was saved last. No collective."""
        for variable, value in zip(self._variables(), self._saved.values):
            variable.assign(value)
        self._move_to(self._saved.position)
        self._set_objects(copy.deepcopy(self._saved.objects))

    def sync(self) -> None:
        """Take over what the worker holds that has seen most commits, the first of them. Collective.

        Raises ValueError on all workers where they do not hold variables of the same shapes and dtypes.
        """
        if self.is_alone:
            return
        with _lost_peers():
            held = self._variables()
            variables.check_alike(held, self._backend, _NAME)
            root = self._eldest()
            self._backend.broadcast(held, root)
            mine = self._age, self._position(), self._objects()
            told = _horovod_elastic().broadcast_object(mine, root_rank=root, name="distpad_elastic_objects")
        self._age, position, objects = told
        self._move_to(position)
        self._set_objects(objects)
        self.save()

    def on_hosts_updated(self, timestamp: Any, update: Any) -> None:
        """Horovod's launcher knows of other hosts. Called in a thread of Horovod's."""
        self._hosts.on_hosts_updated(timestamp, update)

    def on_reset(self) -> None:
        """A new job has formed. What was heard of hosts meanwhile is kept: a host may have come after it formed."""
        horovod.renew()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _variables(self) -> list[tf.Variable]:
        found = _flat(self._tracked)
        if len(found) != self._count:
            remedy = "Build optimisers before: optimizer.build(model.trainable_variables)."
            raise ValueError(
                errors.sentence(_NAME, "variables", f"{len(found)} now", f"{self._count}, as when it was made", remedy)
            )
        return found

    def _eldest(self) -> int:
        workers, worker = self._backend.num_workers, self._backend.worker_index
        most = self._backend.host_max(np.array([self._age * workers + workers - 1 - worker], np.int64))
        return workers - 1 - int(most[0]) % workers

    def _objects(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def _set_objects(self, objects: dict[str, Any]) -> None:
        for name in self._names:
            setattr(self, name, objects[name])

    def _position(self) -> dict[str, Any] | None:
        return None if self.batches is None else self.batches.state_dict()

    def _move_to(self, position: dict[str, Any] | None) -> None:
        if self.batches is not None:
            self.batches.load_state_dict(position)


def _flat(given: Sequence[Any]) -> list[tf.Variable]:
    """Variables, and those of models and optimisers, of which some have a method for them and some a list."""
    found: list[Any] = []
    for item in given:
        held = getattr(item, "variables", [item])
        found += held if isinstance(held, (list, tuple)) else held()
    return [variables.tensorflow_variable(variable, _NAME) for variable in found]


def _checked_backend(backend: base.Backend) -> base.Backend:
    if not isinstance(backend, (horovod.HorovodBackend, local.LocalBackend)):
        raise ValueError(errors.sentence(_NAME, "backend", backend.name, "Horovod, which is elastic, or one device"))
    if isinstance(backend, horovod.HorovodBackend) and not backend.has_all_ranks:
        raise ValueError(errors.sentence(_NAME, "backend", "of a process set", "one of all ranks"))
    return backend


def _checked_batches(batches: Any) -> Any:
    if batches is None:
        return None
    if not (hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")):
        raise TypeError(errors.sentence(_NAME, "batches", type(batches).__name__, "a distpad.PaddedBatches"))
    if "sampler" not in batches.state_dict()["source"]:
        remedy = "A place in a source of each worker's own means nothing to another number of workers."
        rule = "batches of (indexable, LengthSampler)"
        raise ValueError(errors.sentence(_NAME, "batches", "without a sampler", rule, remedy))
    return batches


def _horovod_elastic() -> Any:
    """``horovod.tensorflow``, with the parts of its elastic loop that are used here and are not promised to users."""
    hvd = horovod.initialised()
    missing = [name for name in ("HorovodInternalError", "ObjectState", "run_fn") if not hasattr(hvd.elastic, name)]
    if missing:
        raise ImportError(f"{_NAME}: this Horovod's elastic module has no {', '.join(missing)}, as 0.28.1 has.")
    return hvd


def _hosts(backend: base.Backend) -> Any:
    """Horovod's own state, with nothing in it, as the ear for what its launcher says of hosts. None without Horovod."""
    if not isinstance(backend, horovod.HorovodBackend):
        return None
    hvd = _horovod_elastic()
    tell = functools.partial(hvd.broadcast_object, root_rank=0, name="distpad_elastic_hosts")
    return hvd.elastic.ObjectState(bcast_object=tell, get_rank=hvd.rank)


@contextlib.contextmanager
def _lost_peers() -> Iterator[None]:
    """Raise what Horovod's loop recovers from, where a collective failed since a worker was lost."""
    try:
        yield
    except Exception as error:
        if _tells_of_a_lost_peer(error):
            raise _horovod_elastic().elastic.HorovodInternalError(str(error)) from error
        raise


def _tells_of_a_lost_peer(error: BaseException | None) -> bool:
    """By its words, since TensorFlow knows no better than UnknownError; or what it was raised from, as PaddedBatches
    does. Arguments that differ between workers are another error, and no reason to try again."""
    while error is not None:
        if isinstance(error, tf.errors.UnknownError) and _LOST.search(str(error)):
            return True
        error = error.__cause__
    return False


def _re_form() -> None:
    """Leave the job that was, and join the one that the launcher makes of the workers that there are now."""
    hvd = _horovod_elastic()
    hvd.shutdown()
    hvd.init()
