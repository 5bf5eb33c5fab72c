"""Checkpoints: model, optimiser, position in the data, random state and stats, saved whole and resumed anywhere."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors
from distpad.backends import messages
from distpad.backends.variables import local_parts
from distpad.saving import files, preemption, states

_NAME = "Checkpoints"
_LOG = logging.getLogger("distpad")
_PREFIX = "state"
_CHUNK = 1 << 24  # bytes, over all workers, of a collective that sends files


class _Variable(NamedTuple):
    """A variable, and whether training keeps it equal on all replicas, as weights and optimiser slots."""

    name: str
    value: tf.Variable
    is_trained: bool


class Checkpoints(preemption.Preemption):
    """Save the whole state of a training at regular times and on SIGTERM, and resume on any number of workers.

    A checkpoint is a ``tf.train.Checkpoint`` of all the objects, in a folder of its own, ``FOLDER/step-00000200``. It
    is written under another name, flushed to the disk, and renamed; a manifest has the sizes and checksums of its
    files. A checkpoint of which a byte is missing or wrong is never loaded: ``restore`` takes the newest whole one.

        checkpoints = distpad.Checkpoints(folder, every_steps=500, model=model, optimizer=optimizer, batches=batches)
        with checkpoints:
            done = checkpoints.restore()
            for done, batch in zip(range(done + 1, steps + 1), batches.repeat()):
                step(batch)
                checkpoints.step(done)

    Worker 0 writes. Before it writes, all workers compare checksums of their weights and optimiser slots, on each
    replica: weights that differ between replicas are an error, and are not saved. What may differ is saved for each
    replica and worker: moving averages, the state of TensorFlow's and Keras 3's random generators, NumPy's and Python's
    generators, ``batches.stats``. On the same number of replicas and workers each gets its own back, and training goes
    on as if nothing had happened, bit for bit under MultiWorkerMirroredStrategy and MirroredStrategy on CPUs. On
    another number, replica r takes the random state of saved replica r modulo their number, moving averages are those
    of replica 0 (in Keras 2 the mean of all), and worker 0 continues the sums of all workers' stats. Weights, optimiser
    and, if ``batches`` have a sampler, the position are the same on any number of workers, on any engine.

    As ``Preemption``: every ``sync_every`` steps one collective shows whether any worker received SIGTERM. Then all
    workers save at this step and exit with code 143. The end of the block saves too, unless by an error.

    Args:
      folder: a local or mounted folder, which only this training writes to. Workers may share it. If they do not,
        worker 0 writes into its own, and sends the files to the others on ``restore``.
      every_steps: steps between two checkpoints; None: see ``every_s``.
      every_s: seconds after which the next ``sync_every`` steps end with a checkpoint; None: see ``every_steps``.
        With neither, only SIGTERM and the end of the block save.
      keep: number of checkpoints that are kept; the oldest are removed.
      sync_every: steps between two collectives of a few numbers, at least 1.
      backend: see ``distpad.backends.resolve``.
      objects: by name: models, optimisers, ``PaddedBatches``, ``tf.random.Generator`` and all that
        ``tf.train.Checkpoint`` takes, and Keras's seed generators; ``numpy.random.Generator``, ``random.Random``, the
        modules ``random`` and ``numpy.random``; objects with ``state_dict()`` and ``load_state_dict(state)``, whose
        state is made of numbers, strings, lists, tuples, dicts and arrays.

    Raises:
      ValueError: no objects; a number below its least.
      TypeError: an object without a state, or a number of another type.

    >>> import tempfile
    >>> folder, weight = tempfile.mkdtemp(), tf.Variable(0.0)
    >>> with Checkpoints(folder, every_steps=2, weight=weight) as checkpoints:
    ...     for done in range(checkpoints.restore() + 1, 4):
    ...         _ = weight.assign_add(1.0)
    ...         checkpoints.step(done)
    >>> Checkpoints(folder, weight=weight).restore()
    3
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every_steps: int | None = None,
        every_s: float | None = None,
        keep: int = 3,
        sync_every: int = 10,
        backend: Any = None,
        **objects: Any,
    ) -> None:
        self._begin(self._save_all, backend, sync_every=sync_every, every_steps=every_steps)
        self._folder = pathlib.Path(folder)
        self._every_s = None if every_s is None else errors.number(_NAME, "every_s", every_s)
        errors.require(_NAME, every_s is None or every_s > 0, "every_s", every_s, "above 0")
        self._keep = errors.integer(_NAME, "keep", keep, least=1)
        errors.require(_NAME, objects, "objects", "none", "model=model, optimizer=optimizer, batches=batches")
        taken = [name for name in objects if name.startswith("distpad") or name in ("root", "save_counter")]
        rule = "names other than root and save_counter, which do not begin with distpad"
        errors.require(_NAME, not taken, "objects", f"with {taken}", rule)
        is_local = "://" not in os.fspath(folder)
        errors.require(_NAME, is_local, "folder", errors.shown(folder), "a local or mounted folder")
        self._tracked: dict[str, Any] = {}
        self._in_python: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {}
        for name, given in objects.items():
            held = getattr(given, "state", None)  # a seed generator of Keras 3, which TensorFlow does not track
            if is_trackable(given):
                self._tracked[name] = given
            elif is_variable(held):
                self._tracked[name] = backends.tensorflow_variable(held, _NAME)
            else:
                self._in_python[name] = states.access(_NAME, name, given)
        self._stats = {name: each.stats for name, each in self._tracked.items() if _has_stats(each)}
        self._saved_at, self._saved_step, self._may_begin = time.monotonic(), 0, False

    def __enter__(self) -> Checkpoints:
        super().__enter__()
        self._saved_at = time.monotonic()
        return self

    def step(self, done: int) -> None:
        """Save, and exit if any worker received SIGTERM, where it is time. Call this after each optimiser step.

        Args:
          done: number of completed steps, those before ``restore`` included, equal on all workers.

        Raises:
          SystemExit: with code 143, after SIGTERM to any worker.
          DistpadError: on all workers: weights differ between replicas. They are not saved.
          PeerError: another worker could not save.
          OSError, tf.errors.OpError: this worker could not save, for example on a full disk.
          ValueError: ``done`` is below that of the last call, or of ``restore``, in a job that is not elastic. On all
            workers: ``done``, ``sync_every`` or ``every_steps`` differs between workers; ``folder``
            has checkpoints, and ``restore`` was not called.
          TypeError: ``done`` is not an integer.

        Collective at the first step, unless the job is elastic, at each multiple of ``sync_every`` and of
        ``every_steps``, and at the end of the block.
        """
        self._count(done)
        if not self._is_time():
            return
        every = self._steps["every_steps"]
        saves = every is not None and done % every == 0
        saves |= self._every_s is not None and time.monotonic() > self._saved_at + self._every_s
        has_others = not self._may_begin and not self._backend.is_elastic and self._writes and files.steps(self._folder)
        wish = self._sync(2 if has_others else int(saves))
        if wish == 2:
            found = f"{self._folder}, which has checkpoints already"
            remedy = "Call restore() before the first step, or give a folder for each training."
            raise ValueError(errors.sentence(_NAME, "folder", found, "an empty folder", remedy))
        self._may_begin = True
        if wish:
            self._save_all()

    def restore(self) -> int:
        """Restore the newest whole checkpoint of any worker, on all workers.

        Make the model, and build the optimiser (``optimizer.build(model.trainable_variables)``), before this call. A
        newer checkpoint that is not whole is renamed to ``broken-step-...``, with a warning.

        Returns: the number of steps that are done: 0 if the folder has no checkpoint on any worker. Equal on all.

        Raises:
          DistpadError: on all workers: no checkpoint is whole, or weights differ between replicas afterwards. On this
        worker: the objects are not those that were saved.
          ValueError: a state that an object does not take, such as a position in another source.
          PeerError: another worker could not restore.

        Collective among workers.
        """
        self._may_begin = True
        found = self._gather(self._found)
        newest = [each["step"] for each in found]
        if max(newest) < 0:
            broken = {step: why for each in found for step, why in each["broken"].items()}
            if not broken:
                return 0
            reasons = "; ".join(f"step {step}: {why}" for step, why in broken.items())
            remedy = "Start with an empty folder, or restore the files from elsewhere."
            raise errors.DistpadError(f"{_NAME}: no checkpoint in {self._folder} is whole: {reasons}. {remedy}")
        root = newest.index(max(newest))
        step, content = found[root]["step"], found[root]["content"]
        mine = found[self._backend.worker_index]
        if self._writes:
            for broken_step, why in mine["broken"].items():
                _LOG.warning("%s: step %d in %s is not whole: %s.", _NAME, broken_step, self._folder, why)
                files.set_aside(files.path_of(self._folder, broken_step))
        with contextlib.ExitStack() as stack:
            path = files.path_of(self._folder, step)
            is_here = mine["content"] == content
            if not all(self._gather(lambda: is_here)):
                received = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="distpad-checkpoint-")))
                self._send(path, received, content, is_root=self._backend.worker_index == root)
                path = path if is_here else received
            self._gather(lambda: self._read(path))
        self._compare(self._gather(self._describe))
        self._done = self._saved_step = step
        self._saved_at = time.monotonic()
        return step

    # -- saving -------------------------------------------------------------------------------------------------------

    @property
    def _writes(self) -> bool:
        return self._backend.worker_index == 0

    def _end(self) -> None:
        if self._sync(int(self._done > self._saved_step)):
            self._save_all()

    def _save_all(self) -> None:
        """Save a checkpoint of this step, unless there is one. Collective among workers."""
        # a worker that has joined an elastic job does not know what was saved
        if not any(self._gather(lambda: self._done != self._saved_step)):
            return
        described = self._gather(self._describe)
        differ = self._compare(described)
        parts = self._gather(lambda: self._parts(differ)) if differ else []
        content = {
            "step": self._done,
            "counts": described[0]["counts"],
            "replicas": {i: [part for worker in parts for part in worker[at]] for at, i in enumerate(differ)},
            "workers": [each["states"] for each in described],
        }
        with contextlib.ExitStack() as stack:
            where: list[pathlib.Path] = []

            def prepare() -> None:  # before the collectives of _write, so that no worker fails before them
                if self._writes:
                    where.append(files.prepare(self._folder))
                elif self._backend.strategy is not None:
                    where.append(pathlib.Path(tempfile.mkdtemp(prefix="distpad-checkpoint-")))
                for path in where:  # as after an error; the checkpoint itself has another name by then
                    stack.callback(shutil.rmtree, path, ignore_errors=True)

            self._gather(prepare)
            self._gather(lambda: self._write(where, messages.pack(content, _NAME).decode()))
        self._saved_step, self._saved_at = self._done, time.monotonic()

    def _write(self, where: Sequence[pathlib.Path], text: str) -> None:
        """Write the checkpoint. Under a strategy all workers read the variables, because reading may be collective."""
        if not where:
            return
        checkpoint = self._checkpoint(text)
        checkpoint.write(str(where[0] / _PREFIX))
        if self._writes:
            files.commit(where[0], self._done, self._keep)

    def _describe(self) -> dict[str, Any]:
        """What the workers compare before they save, and the states in Python of this worker."""
        held = self._variables()
        return {
            "done": self._done,
            "names": [each.name for each in held],
            "trained": [each.is_trained for each in held],
            "sums": [[states.checksum(part) for part in self._parts_of(each)] for each in held],
            "states": {name: get() for name, (get, _) in self._in_python.items()}
            | {name: each.state_dict() for name, each in self._stats.items()},
            "counts": {name: len(self._variables_of({name: each})) for name, each in self._tracked.items()},
        }

    def _compare(self, described: Sequence[dict[str, Any]]) -> list[int]:
        """The variables that differ between replicas. Raises DistpadError if one of them must not differ."""
        names, trained = described[0]["names"], described[0]["trained"]
        if any(each["counts"] != described[0]["counts"] for each in described):
            found = [each["counts"] for each in described]
            remedy = "Give all workers the same objects, and build the model and the optimiser first."
            rule = "the same on all workers"
            raise errors.DistpadError(errors.sentence(_NAME, "the number of variables", found, rule, remedy))
        differ = []
        for i, name in enumerate(names):
            sums = [part for each in described for part in each["sums"][i]]
            others = [replica for replica, part in enumerate(sums) if part != sums[0]]
            if others and trained[i]:
                raise errors.DistpadError(
                    f"{_NAME}: {name} differs between replicas at step {described[0]['done']}: replicas {others} do "
                    "not have the values of replica 0, expected equal weights. Nothing was saved. Broadcast the first "
                    "weights (distpad.broadcast_variables), and reduce all gradients."
                )
            if others:
                differ.append(i)
        return differ

    def _parts(self, chosen: Sequence[int]) -> list[list[np.ndarray]]:
        held = self._variables()
        return [self._parts_of(held[i]) for i in chosen]

    def _parts_of(self, variable: _Variable) -> list[np.ndarray]:
        """The values of a variable on the replicas of this worker."""
        return [np.asarray(part.numpy()) for part in local_parts(variable.value, self._backend)]

    # -- restoring ----------------------------------------------------------------------------------------------------

    def _found(self) -> dict[str, Any]:
        if self._folder.exists() and not self._folder.is_dir():
            raise NotADirectoryError(errors.sentence(_NAME, "folder", f"{self._folder}, a file", "a folder"))
        step, broken = files.newest_whole(self._folder)
        content = None if step is None else files.manifest(files.path_of(self._folder, step))
        return {"step": -1 if step is None else step, "content": content, "broken": broken}

    def _send(self, source: pathlib.Path, target: pathlib.Path, content: dict[str, Any], *, is_root: bool) -> None:
        """Write the files of one worker into ``target`` on all. Collective."""
        size = _CHUNK // self._backend.num_workers // 4 * 4
        for name, entry in content["files"].items():
            with (target / name).open("wb") as written:
                for begin in range(0, entry["bytes"], size):
                    count = min(size, entry["bytes"] - begin)
                    words = np.zeros(-(-count // 4), np.int32)  # no engine sums bytes
                    if is_root:
                        with (source / name).open("rb") as read, contextlib.suppress(OSError):
                            read.seek(begin)
                            read.readinto(words.view(np.uint8)[:count])
                    written.write(self._backend.host_sum(words).astype(np.int32).tobytes()[:count])
        self._gather(lambda: files.check_files(target, content))

    def _read(self, path: pathlib.Path) -> None:
        """Read the checkpoint at ``path``. The manifest's checksums say that it is whole."""
        held, text = self._variables(), states.Text()
        tf.train.Checkpoint(distpad=text).read(str(path / _PREFIX)).expect_partial()
        content = messages.decode(text.text)
        for name, each in self._tracked.items():
            count, expected = len(self._variables_of({name: each})), content["counts"].get(name)
            if expected is None or count != expected:
                saved = "not in the checkpoint" if expected is None else f"with {count} variables"
                remedy = "Build it before restore(), in the scope: optimizer.build(model.trainable_variables)."
                rule = f"one of {sorted(content['counts'])}" if expected is None else f"{expected}, as it was saved"
                raise errors.DistpadError(errors.sentence(_NAME, name, saved, rule, remedy * (expected is not None)))
        try:
            self._checkpoint("").read(str(path / _PREFIX)).assert_existing_objects_matched().expect_partial()
        except tf.errors.InvalidArgumentError as error:
            found = f"of variables of other shapes or dtypes ({error.message})"
            raise errors.DistpadError(errors.sentence(_NAME, "objects", found, "those that were saved")) from error
        first = self._backend.worker_index * self._backend.replicas_here
        for i, parts in content["replicas"].items():
            # on another number of replicas, averages stay as TensorFlow restored them
            if len(parts) == self._backend.num_replicas or held[i].value.dtype.is_integer:
                for at, part in enumerate(self._backend.local_results(held[i].value)):
                    part.assign(parts[(first + at) % len(parts)])
        workers = content["workers"]
        unknown = [name for name in self._in_python if name not in workers[0]]
        if unknown:
            rule = f"among those that were saved, {sorted({*content['counts'], *workers[0]})}"
            raise errors.DistpadError(errors.sentence(_NAME, "objects", f"with {unknown}", rule))
        for name, (_, load) in self._in_python.items():
            load(workers[self._backend.worker_index % len(workers)][name])
        for name, stats in self._stats.items():
            stats.continue_from([each[name] for each in workers], self._backend.worker_index, self._backend.num_workers)

    # -- both ---------------------------------------------------------------------------------------------------------

    def _checkpoint(self, text: str) -> tf.train.Checkpoint:
        """The checkpoint of all objects, and of the variables that TensorFlow does not track (Keras 3's seeds)."""
        tracked = {id(variable) for variable in _tracked_by(tf.train.Checkpoint(**self._tracked))}
        others = [each.value for each in self._variables() if id(each.value) not in tracked]
        state = states.Text()
        state.text = text
        return tf.train.Checkpoint(**self._tracked, distpad=state, distpad_variables=others)

    def _variables(self) -> list[_Variable]:
        return self._variables_of(self._tracked)

    def _variables_of(self, objects: dict[str, Any]) -> list[_Variable]:
        """All variables of the objects, each once, in an order that depends on the objects alone."""
        found: dict[int, _Variable] = {}
        for name, given in objects.items():
            root = tf.train.Checkpoint(given=given)  # of which the view keeps no reference
            tracked = tf.train.TrackableView(root).descendants()
            # fit makes metrics in its first step, and begins each epoch with empty ones
            layers = [each for each in tracked if isinstance(each, tf.keras.layers.Layer)]
            metrics = [metric for layer in layers for metric in layer.metrics]
            of_metrics = {id(backends.tensorflow_variable(item, _NAME)) for each in metrics for item in _held(each)}
            for each in tracked:
                is_optimizer = hasattr(each, "apply_gradients")
                # the variables of other objects are tracked themselves
                held = _held(each) if is_optimizer or isinstance(each, tf.keras.layers.Layer) else []
                for item in [each] if is_variable(each) else held:
                    value = backends.tensorflow_variable(item, _NAME)
                    if id(value) in of_metrics:
                        continue
                    label = f"{name}: {getattr(item, 'path', item.name)}"
                    is_trained = is_optimizer or bool(item.trainable)
                    before = found.setdefault(id(value), _Variable(label, value, is_trained))
                    if is_trained and not before.is_trained:
                        found[id(value)] = before._replace(is_trained=True)
        return [*found.values()]

    def _gather(self, local: Callable[[], Any]) -> list[Any]:
        """The results of ``local()`` on all workers, as JSON. An error on one worker is raised on all. Collective."""
        error = None
        try:
            told = messages.pack({"given": local()}, _NAME)
        except Exception as caught:
            error, told = caught, messages.pack({"error": f"{type(caught).__name__}: {caught}"}, _NAME)
        found = [messages.unpack(each, "a report") for each in self._backend.host_all_gather_bytes(told)]
        if error is not None:
            raise error
        for worker, each in enumerate(found):
            if "error" in each:
                raise errors.PeerError(f"{_NAME}: worker {worker} failed at step {self._done}: {each['error']}")
        return [each["given"] for each in found]


def is_trackable(given: Any) -> bool:
    """Whether ``tf.train.Checkpoint`` takes the object."""
    if errors.is_deep(given):
        return False
    try:
        tf.train.Checkpoint(given=given)
    except ValueError:
        return False
    return True


def _has_stats(given: Any) -> bool:
    """Whether the object is a PaddedBatches; a model may have an attribute of this name too."""
    return hasattr(getattr(given, "stats", None), "continue_from")


def is_variable(given: Any) -> bool:
    """Whether the object is a variable of TensorFlow, Keras 2 or Keras 3."""
    return isinstance(given, tf.Variable) or isinstance(getattr(given, "value", None), tf.Variable)


def _tracked_by(checkpoint: tf.train.Checkpoint) -> list[tf.Variable]:
    found = filter(is_variable, tf.train.TrackableView(checkpoint).descendants())
    return [backends.tensorflow_variable(each, _NAME) for each in found]


def _held(given: Any) -> list[Any]:
    """The variables that a layer, an optimiser or a metric lists: in Keras 2 optimisers have a method for them."""
    listed = given.variables
    return [each for each in (listed() if callable(listed) else listed) if is_variable(each)]
