"""Read strings in pictures by a convolutional network with batch normalisation and dropout in Keras's fit.

python examples/fit/convolutional_reader.py                                   # on one device
python examples/fit/convolutional_reader.py 2                                 # on two devices
launch/multiworker.sh -np 2 -- python examples/fit/convolutional_reader.py    # on two workers
launch/horovodrun.sh -np 2 -- python examples/fit/convolutional_reader.py     # on two ranks of Horovod
"""

import sys

import numpy as np
import tensorflow as tf

import distpad

engine = distpad.backends.start(replicas=int(sys.argv[1]) if len(sys.argv) > 1 else None)
tf.keras.utils.set_random_seed(0)
shapes = np.random.normal(size=[11, 6, 8]).astype("float32")  # of ten characters; class 0 is CTC's blank
texts = [np.random.randint(1, 11, n) for n in np.random.randint(1, 8, 100)]
examples = [{"image": np.concatenate(shapes[text]), "text": text} for text in texts]
sampler = distpad.LengthSampler([len(text) for text in texts], global_batch_size=8)
with engine.scope():
    image, widths = tf.keras.Input([None, 8]), tf.keras.Input([], dtype="int32")
    indices = tf.keras.Input([], dtype="int64")
    hidden = tf.keras.layers.Conv1D(32, 9, padding="same", use_bias=False)(image)
    hidden = tf.keras.layers.ReLU()(distpad.layers.BatchNormalization()(hidden, lengths=widths))
    hidden = distpad.layers.Dropout(0.1)(hidden, indices=indices)
    model = tf.keras.Model([image, widths, indices], tf.keras.layers.Dense(11)(hidden))
    model.compile(
        loss=distpad.DistributedLoss(distpad.CTC(blank_index=0), per="sequence", average="sequence_sum"),
        optimizer=distpad.DistributedOptimizer(tf.keras.optimizers.SGD(0.02, momentum=0.9)),
    )
    padding = {"image": distpad.Pad(), "text": distpad.Pad()}
    batches = distpad.PaddedBatches((examples, sampler), padding=padding, tokens="text")
fed = batches.for_keras(x=("image", distpad.Lengths("image"), distpad.Indices()), y="text", repeat=True)
history = model.fit(fed, epochs=3, steps_per_epoch=len(batches), verbose=0).history
if engine.worker_index == 0:
    for epoch, loss in enumerate(history["loss"]):
        print(f"{engine.num_replicas} replicas, epoch {epoch}: loss {loss:.4f}")
