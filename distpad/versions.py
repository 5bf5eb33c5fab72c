"""The major version of Keras that ``tf.keras`` is: 2 or 3."""

from __future__ import annotations

import tensorflow as tf

KERAS = int(getattr(tf.keras, "__version__", "2").split(".")[0])
