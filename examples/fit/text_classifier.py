"""Classify texts of different lengths in Keras's fit.

python examples/fit/text_classifier.py                                   # on one device
python examples/fit/text_classifier.py 2                                 # on two devices
launch/multiworker.sh -np 2 -- python examples/fit/text_classifier.py    # on two workers
launch/horovodrun.sh -np 2 -- python examples/fit/text_classifier.py     # on two ranks of Horovod
"""

import sys

import numpy as np
import tensorflow as tf

import distpad

engine = distpad.backends.start(replicas=int(sys.argv[1]) if len(sys.argv) > 1 else None)
tf.keras.utils.set_random_seed(0)
texts = [np.random.randint(1, 30, n) for n in np.random.randint(1, 24, 90)]
examples = [{"words": text, "label": np.int64(np.mean(text) > 15)} for text in texts]
sampler = distpad.LengthSampler([len(text) for text in texts], global_batch_size=16)
with engine.scope():
    layers = [tf.keras.layers.Embedding(30, 8, mask_zero=True), tf.keras.layers.GlobalAveragePooling1D()]
    model = tf.keras.Sequential([tf.keras.Input([None], dtype="int64"), *layers, tf.keras.layers.Dense(2)])
    entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        loss=distpad.DistributedLoss(entropy, per="sequence", average="sequence_sum"),
        optimizer=distpad.DistributedOptimizer(tf.keras.optimizers.SGD(2.0, momentum=0.9)),
        weighted_metrics=[distpad.metrics.TokenAccuracy(name="accuracy")],
    )
    batches = distpad.PaddedBatches((examples, sampler), padding={"words": distpad.Pad()}, tokens="words")
fed = batches.for_keras(x="words", y="label", repeat=True)
history = model.fit(fed, epochs=3, steps_per_epoch=len(batches), verbose=0).history
if engine.worker_index == 0:
    for epoch, (loss, accuracy) in enumerate(zip(history["loss"], history["accuracy"])):
        print(f"{engine.num_replicas} replicas, epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.2f}")
