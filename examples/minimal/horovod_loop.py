"""Train a tagger of sequences of different lengths under Horovod.

python examples/minimal/horovod_loop.py                           # one worker
horovodrun --gloo -np 2 python examples/minimal/horovod_loop.py   # two workers of this machine
"""

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

import distpad

hvd.init()
tf.keras.utils.set_random_seed(0)
texts = [np.random.randint(0, 10, n) for n in np.random.randint(1, 16, 80)]
examples = [{"text": text, "tags": np.maximum.accumulate(text) // 5} for text in texts]  # whether a 5 or more came
mine = examples[hvd.rank() :: hvd.size()]
layers = [tf.keras.layers.Embedding(10, 8), tf.keras.layers.Conv1D(16, 3, padding="causal", activation="relu")]
model = tf.keras.Sequential([tf.keras.Input([None], dtype="int64"), *layers, tf.keras.layers.Dense(2)])
optimizer = tf.keras.optimizers.Adam(0.02)
distpad.broadcast_variables(model.variables)  # all workers begin alike
loss_fn = distpad.DistributedLoss(tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
padding = {"text": distpad.Pad(), "tags": distpad.Pad()}
batches = distpad.PaddedBatches(mine, batch_size=16 // hvd.size(), padding=padding, tokens="tags")


@tf.function
def step(batch):
    with tf.GradientTape() as tape:
        loss = loss_fn(batch.data["tags"], model(batch.data["text"], training=True), batch=batch)
    gradients = distpad.gradient(tape, loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    return distpad.global_value(loss)


for epoch in range(4):
    losses = [float(step(batch)) for batch in batches]
    if hvd.rank() == 0:
        print(f"{hvd.size()} replicas, epoch {epoch}: loss {np.mean(losses):.4f}", flush=True)
