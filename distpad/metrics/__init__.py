"""Metrics over exactly the valid positions of all replicas of all workers, independent of the number of devices.

Each metric is a ``tf.keras.metrics.Metric`` (Keras 2 and 3), for ``compile``, ``fit`` and ``evaluate`` and for custom
loops. It holds a sum and a count on each replica, and ``result()`` adds these over all replicas. All metrics take

- ``padding_value``: labels equal to it are padding (vectors: where all components are equal to it);
- ``backend``: see ``distpad.backends.resolve``; by default it is detected when the metric is made, inside ``with
  strategy.scope():`` or after ``hvd.init()``. "local" makes a metric of this worker alone;
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
