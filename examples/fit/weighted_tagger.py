"""Tag the words of sentences in Keras's fit, with weights for rare tags.

python examples/fit/weighted_tagger.py                                   # on one device
python examples/fit/weighted_tagger.py 2                                 # on two devices
launch/multiworker.sh -np 2 -- python examples/fit/weighted_tagger.py    # on two workers
launch/horovodrun.sh -np 2 -- python examples/fit/weighted_tagger.py     # on two ranks of Horovod
"""

import sys

import numpy as np
import tensorflow as tf

import distpad

engine = distpad.backends.start(replicas=int(sys.argv[1]) if len(sys.argv) > 1 else None)
tf.keras.utils.set_random_seed(0)
sentences = [np.random.randint(0, 20, n) for n in np.random.randint(1, 24, 96)]
tags = [np.digitize(words, [14, 18]) for words in sentences]  # most words have tag 0, few have tag 2
weights = [np.array([0.5, 2.0, 4.0], "float32")[each] for each in tags]
examples = [{"words": w, "tags": t, "weights": each} for w, t, each in zip(sentences, tags, weights)]
sampler = distpad.LengthSampler([len(words) for words in sentences], global_batch_size=16)
with engine.scope():
    layers = [tf.keras.layers.Embedding(20, 16), tf.keras.layers.Dense(3)]
    model = tf.keras.Sequential([tf.keras.Input([None], dtype="int64"), *layers])
    model.compile(
        loss=distpad.DistributedLoss(tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
        optimizer=distpad.DistributedOptimizer(tf.keras.optimizers.SGD(2.0, momentum=0.9)),
        weighted_metrics=[distpad.metrics.TokenAccuracy(name="accuracy")],
    )
    padding = {name: distpad.Pad() for name in ("words", "tags", "weights")}
    batches = distpad.PaddedBatches((examples, sampler), padding=padding, tokens="tags", weights="weights")
fed = batches.for_keras(x="words", y="tags", repeat=True)
history = model.fit(fed, epochs=3, steps_per_epoch=len(batches), verbose=0).history
if engine.worker_index == 0:
    for epoch, (loss, accuracy) in enumerate(zip(history["loss"], history["accuracy"])):
        print(f"{engine.num_replicas} replicas, epoch {epoch}: loss {loss:.4f}, weighted accuracy {accuracy:.2f}")
