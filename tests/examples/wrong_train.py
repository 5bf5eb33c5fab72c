"""train.py with a factor of 1.01 in every loss, which nothing but --certify would tell of."""

import pathlib
import runpy

from distpad.backends import base

right = base.Backend.gradient_scale.fget
base.Backend.gradient_scale = property(lambda self: 1.01 * right(self))
runpy.run_path(
    str(pathlib.Path(__file__).resolve().parents[2] / "examples" / "handwriting" / "train.py"), run_name="__main__"
)
