"""Read strings of characters in pictures with CTC in Keras's fit.

python examples/fit/ctc_reader.py                                   # on one device
python examples/fit/ctc_reader.py 2                                 # on two devices
launch/multiworker.sh -np 2 -- python examples/fit/ctc_reader.py    # on two workers
launch/horovodrun.sh -np 2 -- python examples/fit/ctc_reader.py     # on two ranks of Horovod
"""

import sys

import numpy as np
import tensorflow as tf

import distpad

engine = distpad.backends.start(replicas=int(sys.argv[1]) if len(sys.argv) > 1 else None)
tf.keras.utils.set_random_seed(0)
shapes = np.random.normal(size=[11, 6, 8]).astype("float32")  # of ten characters; class 0 is CTC's blank
texts = [np.random.randint(1, 11, n) for n in np.random.randint(1, 8, 96)]
examples = [{"image": np.concatenate(shapes[text]), "text": text} for text in texts]
sampler = distpad.LengthSampler([len(text) for text in texts], global_batch_size=16)
with engine.scope():
    layers = [tf.keras.layers.Conv1D(32, 9, strides=2, padding="same", activation="relu"), tf.keras.layers.Dense(11)]
    model = tf.keras.Sequential([tf.keras.Input([None, 8]), *layers])
    model.compile(
        loss=distpad.DistributedLoss(
            distpad.CTC(blank_index=0, frames_per_step=2), per="sequence", average="sequence_sum"
        ),
        optimizer=distpad.DistributedOptimizer(tf.keras.optimizers.SGD(0.02, momentum=0.9)),
        weighted_metrics=[distpad.metrics.CharacterErrorRate(name="cer", decode="ctc", frames_per_step=2)],
    )
    padding = {"image": distpad.Pad(), "text": distpad.Pad()}
    batches = distpad.PaddedBatches((examples, sampler), padding=padding, tokens="text")
fed = batches.for_keras(x="image", y="text", repeat=True)
history = model.fit(fed, epochs=3, steps_per_epoch=len(batches), verbose=0).history
if engine.worker_index == 0:
    for epoch, (loss, rate) in enumerate(zip(history["loss"], history["cer"])):
        print(f"{engine.num_replicas} replicas, epoch {epoch}: loss {loss:.4f}, character error rate {rate:.2f}")
