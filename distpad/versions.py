"""The version of Keras that ``tf.keras`` is: 2 or 3, and the number after the point."""

from __future__ import annotations

import tensorflow as tf

KERAS, KERAS_MINOR = map(int, getattr(tf.keras, "__version__", "2.0").split(".")[:2])  # Keras 2 does not tell
