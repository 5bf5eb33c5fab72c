"""Elastic training (``--elastic``): continue when workers leave or join."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

import distpad
from handwriting import engines
from handwriting.learner import Learner


def run(
    train_and_test: Callable[..., None], learner: Learner, batches: distpad.PaddedBatches, options: argparse.Namespace
) -> None:
    """Call ``train_and_test(commit=...)``, and again from the last commit when workers are lost or join.

    The optimiser's step counter sets the step to continue from. No worker runs a collective before ``begin``: a worker
    that joins meets the other workers at the sync of the state.
    """
    backend = learner.engine.backend
    state = distpad.ElasticState([learner.model, learner.optimizer], batches=batches, backend=backend)

    def commit(done: int) -> None:
        if done % options.commit_every == 0:
            state.commit()

    @distpad.ElasticState.run
    def begin(_: distpad.ElasticState) -> None:
        if options.certify:  # after each resize
            engines.certify(learner.engine)
        train_and_test(commit=commit)
        backend.host_sum(np.zeros(1))  # all wait for worker 0 to write; if it is lost, another worker writes

    begin(state)
