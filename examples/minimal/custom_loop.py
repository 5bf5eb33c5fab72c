"""Train a tagger of sequences of different lengths in a custom loop.

python examples/minimal/custom_loop.py    # on one device
python examples/minimal/custom_loop.py 2  # on two: GPUs, or logical devices of the CPU where there is no GPU
"""

import sys

import numpy as np
import tensorflow as tf

import distpad

replicas = int(sys.argv[1]) if len(sys.argv) > 1 else 1
strategy = distpad.backends.start("mirrored", replicas).strategy  # MirroredStrategy of as many devices
tf.keras.utils.set_random_seed(0)
texts = [np.random.randint(0, 10, n) for n in np.random.randint(1, 16, 80)]
examples = [{"text": text, "tags": np.maximum.accumulate(text) // 5} for text in texts]  # whether a 5 or more came
with strategy.scope():
    layers = [tf.keras.layers.Embedding(10, 8), tf.keras.layers.Conv1D(16, 3, padding="causal", activation="relu")]
    model = tf.keras.Sequential([tf.keras.Input([None], dtype="int64"), *layers, tf.keras.layers.Dense(2)])
    optimizer = tf.keras.optimizers.Adam(0.02)
    optimizer.build(model.trainable_variables)
    loss_fn = distpad.DistributedLoss(tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    padding = {"text": distpad.Pad(), "tags": distpad.Pad()}
    batches = distpad.PaddedBatches(examples, batch_size=16 // replicas, padding=padding, tokens="tags")


@tf.function
def step(batch):
    with tf.GradientTape() as tape:
        loss = loss_fn(batch.data["tags"], model(batch.data["text"], training=True), batch=batch)
    gradients = distpad.gradient(tape, loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    return loss


for epoch in range(4):
    losses = [float(loss_fn.global_value(strategy.run(step, args=(batch,)))) for batch in batches]
    print(f"{strategy.num_replicas_in_sync} replicas, epoch {epoch}: loss {np.mean(losses):.4f}")
