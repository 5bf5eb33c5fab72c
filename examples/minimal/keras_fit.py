"""Train a tagger of sequences of different lengths with Keras's fit.

python examples/minimal/keras_fit.py    # on one device
python examples/minimal/keras_fit.py 2  # on two: GPUs, or logical devices of the CPU where there is no GPU
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
    model.compile(
        loss=distpad.DistributedLoss(tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
        optimizer=tf.keras.optimizers.Adam(0.02),
        weighted_metrics=[distpad.metrics.TokenAccuracy(name="accuracy")],
    )
    padding = {"text": distpad.Pad(), "tags": distpad.Pad()}
    batches = distpad.PaddedBatches(examples, batch_size=16 // replicas, padding=padding, tokens="tags")

history = model.fit(batches.for_keras(x="text", y="tags"), epochs=4, verbose=0).history
for epoch, (loss, accuracy) in enumerate(zip(history["loss"], history["accuracy"])):
    print(f"{strategy.num_replicas_in_sync} replicas, epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.2f}")
