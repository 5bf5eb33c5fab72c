"""A training of 8 steps that kills one of its workers in a phase, another one in each attempt of the launcher.

    killed_training.py FOLDER PHASE...

The attempt after the last phase trains to the end, and then once more from the beginning, undisturbed. Each worker
prints whether both end with the same state to the bit, and the examples of the steps that count.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys

import checkpointed
from distpad import backends
from distpad.saving import files

STEPS, EVERY = 8, 2
DIES_AT = {"step": 3, "between epochs": 6}


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


class Training(checkpointed.Training):
    """Writes the examples of each step to a file."""

    def __init__(self, *arguments, log, phase, **options):
        super().__init__(*arguments, noisy=True, **options)
        self.log, self.dies = log, phase if self.backend.worker_index == 1 else ""

    def step(self, batch):
        super().step(batch)
        if self.dies == "step" and int(self.optimizer.iterations.numpy()) == DIES_AT["step"]:
            die()

    def after_step(self, done, batch):
        (indices,) = self.backend.local_results(batch.indices)
        with self.log.open("a") as log:
            print(json.dumps([done, [i for i in indices.numpy().tolist() if i >= 0]]), file=log, flush=True)
        if self.dies == "between epochs" and done == DIES_AT["between epochs"]:
            die()


def main(folder: pathlib.Path, phases: list[str]) -> None:
    engine = backends.start("auto")
    attempt, worker = int(os.environ["DISTPAD_ATTEMPT"]), engine.worker_index
    phase = phases[attempt] if attempt < len(phases) else ""
    log = folder / f"examples-{worker}"
    training = Training(engine, folder / "checkpoints", every_steps=EVERY, log=log, phase=phase)
    if phase == "before the first exchange" and worker == 1:
        die()
    if phase == "exchange" and worker == 1:
        engine.host_merge = die
    if phase == "checkpoint" and worker == 0:
        commit, files.commit = files.commit, lambda path, step, keep: (die if step == 4 else commit)(path, step, keep)
    first, resumed = training.run(STEPS)
    undisturbed = Training(engine, folder / f"undisturbed-{worker}", log=folder / f"rest-{worker}", phase="").run(
        STEPS
    )[1]
    weights = [value.tobytes() for value in resumed.pop("weights")], [x.tobytes() for x in undisturbed.pop("weights")]
    is_same = weights[0] == weights[1] and resumed == undisturbed
    counted = dict(json.loads(line) for line in log.read_text().splitlines())  # a repeated step counts once, the last
    print(
        "RESULT",
        json.dumps({"first": first, "same": is_same, "steps": counted, "examples": len(checkpointed.EXAMPLES)}),
        flush=True,
    )
    engine.close()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
