"""Metrics over exactly the valid positions of all replicas of all workers, however the data was dealt.

Each is a ``tf.keras.metrics.Metric`` (Keras 2 and 3), for ``compile``, ``fit`` and ``evaluate`` and for custom loops.
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
