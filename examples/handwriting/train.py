#!/usr/bin/env python
"""Train a reader of handwriting on several devices at once.

Without options, the script trains on strings of 1 to 12 handwritten digits, on four CPU replicas, in a few minutes.
A batch holds strings of similar widths (--randomness 1: of any width). Batches have few padded sizes, which are equal
on all replicas. Before training, the script runs the first steps three times: on one device, on all replicas with
distpad, and on all replicas with the usual mean of means. The report shows how far the weights drift apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # oneDNN prints its note at any log level
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tensorflow as tf  # TensorFlow reads its log level on import
from tqdm import tqdm

import distpad
from handwriting import decode, drift, elastic, engines, folder, learner, model, reading, report, rows
from handwriting.strings import DigitStrings, Example

EXAMPLES = """\
examples:
  train.py                                              # digits, four replicas in one process
  train.py --loss position                              # cross-entropy for each position instead of CTC
  train.py --data my-pictures --height 32               # a folder with pictures and labels.csv (file,text)
  train.py --resume                                     # resume from the last checkpoint
  train.py --resume=auto --certify                      # for schedulers that restart the job; SIGTERM saves a
                                                        # checkpoint and exits with code 143
  train.py --max-columns 4096 --average 200             # batches by width; the loss over a constant
  horovodrun -np 2 python train.py --backend horovod    # two processes; their drift joins the same report
  horovodrun -np 2 --min-np 1 --host-discovery-script launch/discover_hosts.sh \\
      python train.py --backend horovod --elastic       # continue when processes leave or join
"""
KEEP = 2  # checkpoints
LOG_EVERY = 10
LOOK_EVERY = 100  # steps between two tests on held-out strings
LOOK_AT = 48


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backend", default="mirrored", metavar="ENGINE", help="local, mirrored (default), multiworker or horovod")
    add("--replicas", type=int, metavar="N", help="replicas on all workers (default 4, or the launcher's number)")
    add("--loss", choices=("ctc", "position"), default="ctc", help="CTC (default), or cross-entropy for each position")
    add("--data", type=Path, metavar="FOLDER", help="folder with pictures and labels.csv (file,text)")
    add("--height", type=int, default=32, metavar="PIXELS", help="height of the scaled pictures (default 32)")
    add("--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="output folder (default runs/demo)")
    add("--steps", type=int, default=1000, metavar="N", help="training steps (default 1000)")
    add("--batch", type=int, default=32, metavar="N", help="examples in a global batch (default 32)")
    add("--strings", type=int, default=8000, metavar="N", help="digit strings to train on (default 8000)")
    add("--boundaries", type=int, default=6, metavar="N", help="number of padded batch sizes (default 6)")
    add("--randomness", type=float, metavar="X", help="0: batches of similar widths, 1: shuffled; see LengthSampler")
    add("--max-columns", type=int, metavar="N", help="columns of pixels in a global batch, instead of --batch")
    add(
        "--average",
        default="sequence_sum",
        metavar="X",
        help="average of the loss: sequence_sum (default), token, ... or a number",
    )
    add("--batch-normalization", action="store_true", help="normalise after each convolution, over all replicas")
    add("--learning-rate", type=float, default=6e-3, metavar="X", help="peak learning rate (default 0.006)")
    add("--seed", type=int, default=0, metavar="N", help="seed of weights and data (default 0)")
    add(
        "--resume",
        nargs="?",
        const="must",
        choices=("must", "auto"),
        metavar="auto",
        help="resume from the last checkpoint in --out; auto: if one exists (for schedulers that restart the job)",
    )
    add(
        "--elastic",
        action="store_true",
        default="HOROVOD_ELASTIC" in os.environ,
        help="continue when workers leave or join; needs --backend horovod (default under an elastic launcher)",
    )
    add("--commit-every", type=int, default=20, metavar="STEPS", help="steps between --elastic commits (default 20)")
    add("--checkpoint-every", type=int, default=200, metavar="STEPS", help="steps between checkpoints (default 200)")
    add("--stop-at", type=int, metavar="STEP", help="save and stop at this step (for queues with a time limit)")
    add("--eval-strings", type=int, default=500, metavar="N", help="held-out strings to test with (default 500)")
    add("--certify", action="store_true", help="before training, compare gradients with one device; exit on error")
    add("--no-drift", dest="drift", action="store_false", help="skip the comparison with one device")
    options = parser.parse_args(arguments)
    counts = "steps batch strings boundaries max_columns commit_every checkpoint_every eval_strings stop_at"
    for name in counts.split():
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least 1")
    if options.elastic and options.backend != "horovod":
        parser.error(f"--backend is {options.backend}, expected horovod with --elastic")
    with contextlib.suppress(ValueError):
        options.average = float(options.average)
    if options.height < 8 or options.height % model.STRIDE:
        parser.error(f"--height is {options.height}, expected a multiple of {model.STRIDE}, at least 8")
    return options


def load(options: argparse.Namespace) -> tuple[rows.Rows, list[Example], model.Config]:
    """Return the training rows, the test examples and the config of the reader."""
    if options.data is None:
        source: rows.Source = DigitStrings("train", options.seed, options.strings)
        test = list(DigitStrings("test", options.seed, options.eval_strings))
    else:
        source = folder.FolderStrings(options.data, "train", options.height)
        test = folder.FolderStrings(options.data, "test", options.height).examples[: options.eval_strings]
        folder.check(source, options.loss)
    config = model.Config(
        source.alphabet,
        options.loss,
        source.max_length,
        source.height,
        batch_normalization=options.batch_normalization,
    )
    return rows.Rows(source, end=options.loss == "position"), test, config


def make_optimizer(options: argparse.Namespace) -> tf.keras.optimizers.Optimizer:
    """Create Adam with a linear warmup and a cosine decay of the learning rate."""
    warmup = min(50, options.steps // 4)
    schedule = tf.keras.optimizers.schedules.CosineDecay(
        0.0, options.steps - warmup, alpha=0.01, warmup_target=options.learning_rate, warmup_steps=warmup
    )
    return tf.keras.optimizers.Adam(schedule)


def make_batches(engine: engines.Engine, data: rows.Rows, options: argparse.Namespace) -> distpad.PaddedBatches:
    """Create the training batches from the options."""
    sampling: dict = {"seed": options.seed}
    if options.max_columns:
        sampling["max_tokens"] = options.max_columns
    else:
        sampling["global_batch_size"] = options.batch
    if options.randomness is not None:
        sampling["randomness"] = options.randomness
    return rows.batches(engine, data, boundaries=options.boundaries, **sampling)


def checkpoints_of(
    learning: learner.Learner, batches: distpad.PaddedBatches, options: argparse.Namespace
) -> distpad.Checkpoints:
    """Create the checkpoints of a training, and restore the newest one with ``--resume``. Collective.

    Raises:
        ValueError: there is no checkpoint to resume from.
    """
    where, backend = options.out / "checkpoints", learning.engine.backend
    objects = {"model": learning.model, "optimizer": learning.optimizer, "batches": batches}
    often = {"every_steps": options.checkpoint_every, "sync_every": LOG_EVERY}
    checkpoints = distpad.Checkpoints(where, keep=KEEP, backend=backend, **often, **objects)
    if steps_of(learning):
        return checkpoints  # after a change of workers
    if not options.resume:
        if learning.engine.worker == 0:
            shutil.rmtree(where, ignore_errors=True)  # of another training
    elif not checkpoints.restore() and options.resume == "must":
        raise ValueError(f"--resume: {where} holds no checkpoint. Leave --resume out to start again.")
    return checkpoints


def steps_of(learning: learner.Learner) -> int:
    """Return the number of steps that the model was trained."""
    return int(learning.optimizer.iterations.numpy())


def train(
    learning: learner.Learner,
    batches: distpad.PaddedBatches,
    reader: reading.TextReader,
    test: list[Example],
    options: argparse.Namespace,
    checkpoints: distpad.Checkpoints,
    commit: Callable[[int], None],
) -> None:
    """Train from the current step of model and batches to the last step, or to ``--stop-at``.

    All workers call it; only worker 0 evaluates, prints and writes. After each step, the loop calls ``commit`` with the
    number of steps done. After SIGTERM to any worker, all workers save and exit.
    """
    engine = learning.engine
    first, last = steps_of(learning), min(options.steps, options.stop_at or options.steps)
    look_at = test[:LOOK_AT]
    shown = {"loss": "?", "CER": "?"}
    often = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file needs few lines
    progress = {"initial": first, "total": last, "unit": "step", "ncols": 88, "mininterval": often}
    with checkpoints, tqdm(range(first + 1, last + 1), disable=engine.worker > 0, **progress) as bar:
        for done, batch in zip(bar, batches.repeat()):
            loss = learning.step(batch)
            if done % LOG_EVERY == 0 or done == last:
                shown["loss"] = f"{learning.global_loss(loss):.3f}"
            if done % LOOK_EVERY == 0 and engine.worker == 0:
                reader.model.set_weights(learning.model.get_weights())
                shown["CER"] = f"{error_rate(reader, look_at):.1%}"
            bar.set_postfix(shown, refresh=False)
            checkpoints.step(done)
            commit(done)
    reader.model.set_weights(learning.model.get_weights())


def error_rate(reader: reading.TextReader, examples: Sequence[Example]) -> float:
    """Return the character error rate on held-out examples."""
    return decode.character_error_rate(reader.read([e.image for e in examples]), [e.text for e in examples])


def conclude(
    engine: engines.Engine,
    batches: distpad.PaddedBatches,
    reader: reading.TextReader,
    test: list[Example],
    options: argparse.Namespace,
    began: float,
) -> None:
    """Test the reader; write reader, summary, samples and report. Only worker 0 calls it."""
    reader.save(options.out / "reader")
    texts = reader.read([example.image for example in test])
    rate = decode.character_error_rate(texts, [example.text for example in test])
    summary = {
        "backend": engine.name,
        "replicas": engine.replicas,
        "loss": options.loss,
        "steps": options.steps,
        "held_out_strings": len(test),
        "character_error_rate": round(rate, 5),
        "seconds": round(time.monotonic() - began, 1),
        "stats": batches.stats.as_dict(),
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report.write_samples(test, options.out / "samples")
    report.finish(summary, str(batches.stats), drift.load_all(options.out), test, texts, options.out)


def run(options: argparse.Namespace) -> None:
    began = time.monotonic()
    engine = engines.start(options.backend, options.replicas)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # TensorFlow's workers ignore SIGTERM otherwise
    if options.batch < engine.replicas and not options.max_columns:
        raise ValueError(
            f"--batch is {options.batch}, expected at least one example for each of {engine.replicas} replicas."
        )
    data, test, config = load(options)
    tf.keras.utils.set_random_seed(options.seed)
    if engine.worker == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        report.announce(engine, data, options, len(test))
    if options.certify and not options.elastic:
        engines.certify(engine)
    tf.keras.utils.set_random_seed(options.seed)
    learning = learner.Learner(engine, config, lambda: make_optimizer(options), average=options.average)
    batches = make_batches(engine, data, options)
    reader = reading.TextReader(config)  # a copy on one device: no worker waits while worker 0 evaluates

    def train_and_test(commit: Callable[[int], None] = lambda done: None) -> None:
        checkpoints = checkpoints_of(learning, batches, options)
        if options.drift and engine.replicas > 1 and not (steps_of(learning) or options.elastic):
            measured = drift.measure(engine, data, config, options.batch // engine.replicas * engine.replicas)
            if engine.worker == 0:
                drift.save(measured, options.out)
        learning.broadcast()
        train(learning, batches, reader, test, options, checkpoints, commit)
        if engine.worker == 0:
            conclude(engine, batches, reader, test, options, began)

    if options.elastic:
        elastic.run(train_and_test, learning, batches, options)
    else:
        train_and_test()
    engine.backend.close()


def main() -> None:
    options = parse()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        run(options)
    except ValueError as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
