"""Training with workers that come and go: what --elastic adds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

import distpad
from handwriting import checkpoints, engines
from handwriting.learner import Learner


def run(
    train_and_test: Callable[..., None],
    learner: Learner,
    batches: distpad.PaddedBatches,
    folder: Path,
    options: argparse.Namespace,
) -> None:
    """Call ``train_and_test(checkpoints, commit=...)``, and again from the last commit when workers are lost or join.

    The optimiser's own count of steps tells where it goes on. No worker has a collective to itself before: one that
    joins finds the others where they wait for it to take over what they have.

    Raises:
        ValueError: worker 0 finds no checkpoint to resume from.
    """
    backend = learner.engine.backend
    if options.resume:
        saved = checkpoints.Checkpoints(learner, batches, folder)
        must = backend.worker_index == 0 and options.resume != "auto"
        if must or checkpoints.found(folder):
            saved.load()
    state = distpad.ElasticState([learner.model, learner.optimizer], batches=batches, backend=backend)

    def commit(done: int) -> None:
        if done % options.commit_every == 0:
            state.commit()

    @distpad.ElasticState.run
    def begin(_: distpad.ElasticState) -> None:
        if options.certify:  # each world of workers
            engines.certify(learner.engine)
        # checkpoints are made again each time, since another worker may be the one that writes them
        train_and_test(checkpoints.Checkpoints(learner, batches, folder), commit=commit)
        backend.host_sum(np.zeros(1))  # nobody leaves before worker 0 has written all: if it is lost, another does

    begin(state)
