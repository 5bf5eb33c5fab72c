"""Load and save a trained reader, and read pictures with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

import distpad
from handwriting import decode, model

BATCH = 64


class TextReader:
    """Reads pictures on one device.

    The saved files, ``config.json`` and ``weights.npz``, do not depend on the version of TensorFlow or Keras.
    """

    def __init__(self, config: model.Config):
        self.config = config
        self.model = model.build(config)
        image = tf.TensorSpec([None, None, config.height, 1])
        self._logits = tf.function(self._logits_of, input_signature=[image, tf.TensorSpec([None], tf.int32)])

    def _logits_of(self, image: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        return self.model({"image": image, "width": width, "positions": tf.constant(self.config.max_length + 1)})

    def read(self, images: Sequence[np.ndarray]) -> list[str]:
        """Return the texts of pictures, each ``[width, height]``."""
        return [text for start in range(0, len(images), BATCH) for text in self._read(images[start : start + BATCH])]

    def _read(self, images: Sequence[np.ndarray]) -> list[str]:
        image, width, _ = distpad.pad(images, ragged_axes=[0], mask=False)
        logits = self._logits(image[..., np.newaxis], width).numpy()
        if self.config.head == "position":
            return decode.position_texts(logits, self.config.alphabet)
        return decode.ctc_texts(logits, model.columns(width), self.config.alphabet)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
        np.savez(folder / "weights.npz", *self.model.get_weights())

    @classmethod
    def load(cls, folder: Path) -> TextReader:
        """Load a reader. Raises ValueError if the folder holds no reader."""
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: holds no reader. Train one first: train.py saves it here when it is done.")
        config = json.loads((folder / "config.json").read_text())
        reader = cls(model.Config(**{**config, "filters": tuple(config["filters"])}))
        with np.load(folder / "weights.npz") as weights:
            reader.model.set_weights([weights[name] for name in weights.files])
        return reader
