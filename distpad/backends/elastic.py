"""ElasticState: training that continues with another number of workers when workers are lost or join."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.backends import base, detection, horovod, local, messages, variables

_NAME = "ElasticState"
# Messages of an UnknownError from a failed collective: of Horovod, of its operations, of its transport.
_LOST = re.compile(r"Horovod has been shut down|Horovod[A-Z]|gloo")


class _Saved(NamedTuple):
    """A commit in this worker's memory."""

    values: list[np.ndarray]
    position: dict[str, Any] | None
    objects: bytes


class ElasticState:
    """The state that the workers of an elastic Horovod job share: variables, the position in the data, and objects.

    ``commit`` keeps a copy of the state in memory. When a worker is lost, the remaining workers restore their last
    commit, form a new job, and continue. When hosts are added or removed, all workers leave their loop at a commit and
    form a new job. Then the worker with the most commits broadcasts its state, also to workers that join. The sampler
    defines the global batch for any number of workers: training takes the same steps as without the change, and each
    example comes once per epoch.

        hvd.init()
        state = distpad.ElasticState([model, optimizer], batches=batches, step=0)

        @distpad.ElasticState.run
        def train(state):
            while state.step < steps:
                for batch in state.batches:  # continues after the last commit
                    step(batch)
                    state.step += 1
                    if state.step % 10 == 0:
                        state.commit()

        train(state)

    Make no collective before the call of ``train``: when a worker joins, the others are already in theirs. Code that
    depends on the rank, such as opening files on rank 0, belongs into ``train``, which is called again after each
    change. tf.functions may be created outside ``train``; they stay correct after a resize if only distpad ops read the
    world size. They are traced again only for new shapes of a batch.

    A worker that joins must come within HOROVOD_GLOO_TIMEOUT_SECONDS (30 s by default, which is short for importing
    TensorFlow on a busy host). If it does not, Horovod aborts the waiting workers and the job ends: start it again from
    a checkpoint.

    In a single process without Horovod, ``run`` only calls the function.

    Args:
      variables: a list of TensorFlow, Keras 2 or Keras 3 variables, and of objects with ``variables``, as models and
        optimisers. Build optimisers first: ``optimizer.build(model.trainable_variables)``.
      batches: a ``PaddedBatches`` over ``(indexable, LengthSampler)``, or None. A commit includes its position.
      backend: see ``distpad.backends.resolve``: Horovod with all its ranks, or one device.
      objects: become attributes, such as ``state.step``: numbers, strings, None, NumPy arrays, and lists, tuples and
        dicts of them. A commit copies them; workers that join receive them as JSON, since nothing is unpickled.

    Attributes:
      batches: the argument.
      is_alone: whether this is a single process without Horovod.

    Raises:
      ValueError: ``batches`` without a sampler, whose position is not valid for another number of workers; an engine
        that is not elastic; a process set; a name in ``objects`` that the state uses itself.
      TypeError: ``variables`` is not a list, or holds an object that is not a variable and has no variables; at a
        commit too: an object of another kind.

    Making a state is not a collective. Source: Horovod's elastic training
    (https://horovod.readthedocs.io/en/stable/elastic).

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
            raise ValueError(errors.sentence(_NAME, "objects", f"with {taken}", "names that the state does not use"))
        self._names = tuple(objects)
        self._set_objects(objects)
        self._age = 0  # commits of this state since the start of the job, on any worker
        self.save()

    @staticmethod
    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate the training function, so that it is called again with the state after each change of workers.

        It replaces ``hvd.elastic.run``, which returns None, as if training were done, when a worker is lost during a
        named or grouped collective.

        Args:
          function: takes the state, then any other arguments.

        Returns:
          A function that returns the result of the last call. Collective among workers.

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

    # -- called by the training function ------------------------------------------------------------------------------

    def commit(self) -> None:
        """Save the state in memory, and leave the loop if hosts were added or removed.

        All workers call it at the same step. It copies the variables to host memory and calls ``check_host_updates``.

        Raises ValueError if the number of variables has changed since the constructor.
        """
        self.save()
        self._age += 1
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Leave the loop, by Horovod's HostsUpdatedInterrupt, if hosts were added or removed. No step is lost.

        All workers call it at the same step. Collective: two small broadcasts.
        """
        if self.is_alone:
            return
        try:
            with _lost_peers():
                self._hosts.check_host_updates()
        except RuntimeError as interrupt:
            if hasattr(interrupt, "skip_sync"):
                # Horovod would skip the sync if hosts were only removed. Hosts may have been added since, whose workers
                # would wait for the sync.
                interrupt.skip_sync = False
                self._move_to(self._position())  # ends the threads that read ahead for the old number of workers
            raise

    def save(self) -> None:
        """Save the state in memory. No collective."""
        values = [variable.numpy() for variable in self._variables()]
        self._saved = _Saved(values, self._position(), messages.pack(self._objects(), _NAME))

    # -- called by Horovod's loop -------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Restore the state that was saved last. No collective."""
        for variable, value in zip(self._variables(), self._saved.values):
            variable.assign(value)
        self._move_to(self._saved.position)
        self._set_objects(messages.unpack(self._saved.objects, "the commit"))

    def sync(self) -> None:
        """Take the state of the worker with the most commits, the first of these workers. Collective.

        Raises ValueError on all workers if their variables differ in number, shapes or dtypes.
        """
        if self.is_alone:
            return
        with _lost_peers():
            held = self._variables()
            variables.check_alike(held, self._backend, _NAME)
            root = self._eldest()
            self._backend.broadcast(held, root)
            mine = self._age, self._position(), self._objects()
            received = _broadcast(mine, root, "distpad_elastic_objects")
        with messages.checked("the state"):
            self._age, position, objects = received
        self._move_to(position)
        self._set_objects(objects)
        self.save()

    def on_hosts_updated(self, timestamp: Any, update: Any) -> None:
        """Note that hosts were added or removed. Horovod calls it in a thread of its own."""
        self._hosts.on_hosts_updated(timestamp, update)

    def on_reset(self) -> None:
        """Adapt to a new job. Notes about hosts are kept, since a host may have been added after the job formed."""
        horovod.renew()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _variables(self) -> list[tf.Variable]:
        found = _flat(self._tracked)
        if len(found) != self._count:
            remedy = "Build optimisers first: optimizer.build(model.trainable_variables)."
            rule = f"{self._count}, as in the constructor"
            raise ValueError(errors.sentence(_NAME, "variables", f"{len(found)} now", rule, remedy))
        return found

    def _eldest(self) -> int:
        """The first worker with the most commits."""
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
    """The variables of a list of variables, models and optimisers; ``variables`` of an object is a list or a method."""
    found: list[Any] = []
    for item in given:
        held = getattr(item, "variables", [item])
        found += held if isinstance(held, (list, tuple)) else held()
    return [variables.tensorflow_variable(variable, _NAME) for variable in found]


def _checked_backend(backend: base.Backend) -> base.Backend:
    if not isinstance(backend, (horovod.HorovodBackend, local.LocalBackend)):
        raise ValueError(errors.sentence(_NAME, "backend", backend.name, "Horovod, which is elastic, or one device"))
    if isinstance(backend, horovod.HorovodBackend) and not backend.has_all_ranks:
        raise ValueError(errors.sentence(_NAME, "backend", "of a process set", "a backend of all ranks"))
    return backend


def _checked_batches(batches: Any) -> Any:
    if batches is None:
        return None
    if not (hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")):
        raise TypeError(errors.sentence(_NAME, "batches", type(batches).__name__, "a distpad.PaddedBatches"))
    if "sampler" not in batches.state_dict()["source"]:
        remedy = "Without a sampler, a position is not valid for another number of workers."
        rule = "batches of (indexable, LengthSampler)"
        raise ValueError(errors.sentence(_NAME, "batches", "without a sampler", rule, remedy))
    return batches


def _horovod_elastic() -> Any:
    """Return ``horovod.tensorflow``. ImportError if its elastic module lacks undocumented names that are used here."""
    hvd = horovod.initialised()
    missing = [name for name in ("HorovodInternalError", "ObjectState", "run_fn") if not hasattr(hvd.elastic, name)]
    if missing:
        raise ImportError(f"{_NAME}: Horovod's elastic module lacks {', '.join(missing)}, expected them as in 0.28.1.")
    return hvd


def _hosts(backend: base.Backend) -> Any:
    """An empty state of Horovod's own, which receives the launcher's notes about hosts. None without Horovod."""
    if not isinstance(backend, horovod.HorovodBackend):
        return None
    hvd = _horovod_elastic()
    broadcast = functools.partial(_broadcast, root=0, name="distpad_elastic_hosts")  # Horovod's own would unpickle
    return hvd.elastic.ObjectState(bcast_object=broadcast, get_rank=hvd.rank)


def _broadcast(value: Any, root: int, name: str) -> Any:
    """The value of rank ``root`` on all ranks, as JSON. Collective: two broadcasts."""
    hvd = _horovod_elastic()
    data = np.frombuffer(messages.pack(value, _NAME) if hvd.rank() == root else b"", np.uint8)
    with tf.device("CPU:0"):
        size = int(hvd.broadcast(tf.constant(len(data), tf.int64), root, name=f"{name}_size"))
        mine = tf.constant(data if hvd.rank() == root else np.zeros(size, np.uint8))
        return messages.unpack(hvd.broadcast(mine, root, name=name).numpy().tobytes(), "the state")


@contextlib.contextmanager
def _lost_peers() -> Iterator[None]:
    """Raise HorovodInternalError, from which Horovod's loop recovers, if a collective failed for a lost worker."""
    try:
        yield
    except Exception as error:
        if _is_of_lost_peer(error):
            raise _horovod_elastic().elastic.HorovodInternalError(str(error)) from error
        raise


def _is_of_lost_peer(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, comes from a collective that lost a worker.

    TensorFlow raises UnknownError, so that only the message tells. Arguments that differ between workers are another
    error, from which a new job would not recover.
    """
    while error is not None:
        if isinstance(error, tf.errors.UnknownError) and _LOST.search(str(error)):
            return True
        error = error.__cause__
    return False


def _re_form() -> None:
    """Leave the old job, and join the launcher's new job of the present workers."""
    hvd = _horovod_elastic()
    hvd.shutdown()
    hvd.init()
