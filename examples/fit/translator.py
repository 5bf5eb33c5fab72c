"""Translate sequences to sequences with teacher forcing in Keras's fit.

python examples/fit/translator.py                                   # on one device
python examples/fit/translator.py 2                                 # on two devices
launch/multiworker.sh -np 2 -- python examples/fit/translator.py    # on two workers
launch/horovodrun.sh -np 2 -- python examples/fit/translator.py     # on two ranks of Horovod
"""

import sys

import numpy as np
import tensorflow as tf

import distpad

engine = distpad.backends.start(replicas=int(sys.argv[1]) if len(sys.argv) > 1 else None)
tf.keras.utils.set_random_seed(0)
sources = [np.random.randint(3, 12, n) for n in np.random.randint(2, 15, 96)]
targets = [
    np.concatenate([[1], np.sort(source)[: 1 + len(source) // 2], [2]]) for source in sources
]  # 1: start, 2: end
examples = [{"source": s, "read": target[:-1], "predicted": target[1:]} for s, target in zip(sources, targets)]
sampler = distpad.LengthSampler([len(source) for source in sources], global_batch_size=8)
with engine.scope():
    source, read = (tf.keras.Input([None], dtype="int64") for _ in range(2))
    _, state = tf.keras.layers.GRU(32, return_state=True)(tf.keras.layers.Embedding(12, 16, mask_zero=True)(source))
    hidden = tf.keras.layers.Embedding(12, 16)(read)
    hidden = tf.keras.layers.GRU(32, return_sequences=True)(hidden, initial_state=state)
    model = tf.keras.Model([source, read], tf.keras.layers.Dense(12)(hidden))
    model.compile(
        loss=distpad.DistributedLoss(tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
        optimizer=distpad.DistributedOptimizer(tf.keras.optimizers.SGD(0.5, momentum=0.9)),
    )
    padding = {name: distpad.Pad() for name in ("source", "read", "predicted")}
    batches = distpad.PaddedBatches((examples, sampler), padding=padding, tokens="predicted")
fed = batches.for_keras(x=("source", "read"), y="predicted", repeat=True)
history = model.fit(fed, epochs=3, steps_per_epoch=len(batches), verbose=0).history
for epoch, loss in enumerate(history["loss"]):
    if engine.worker_index == 0:
        print(f"{engine.num_replicas} replicas, epoch {epoch}: loss {loss:.4f}")
