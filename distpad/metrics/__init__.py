"""Metrics over exactly the valid positions of all replicas of all workers, however the data was dealt.

Each is a ``tf.keras.metrics.Metric`` (Keras 2 and 3), for ``compile``, ``fit`` and ``evaluate`` and for custom loops:
a sum over a count, which replicas hold apart until the result is asked for. All of them take

- ``padding_value``: labels equal to it do not count (vectors: where all components are);
- ``backend``: see ``distpad.backends.resolve``; left out, it is detected when the metric is made, inside ``with
  strategy.scope():`` or behind ``hvd.init()``. "local" makes a metric of this worker alone;
- ``name``: as in Keras.

``update_state(y_true, y_pred, sample_weight=None, *, lengths=None, mask=None)`` and ``reset_state()`` are not
collective; ``result()`` is (``distpad/metrics/ratio.py``).
"""

from distpad.metrics.accuracy import SequenceAccuracy, TokenAccuracy
from distpad.metrics.edits import CharacterErrorRate, WordErrorRate
from distpad.metrics.means import MaskedMean
from distpad.metrics.perplexity import Perplexity

__all__ = [
    "CharacterErrorRate",
    "MaskedMean",
    "Perplexity",
    "SequenceAccuracy",
    "TokenAccuracy",
    "WordErrorRate",
]
