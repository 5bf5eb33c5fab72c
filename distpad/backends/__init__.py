"""The engines: tf.distribute, Horovod, one device. A new engine is one file here; no other package names an engine."""

from distpad.backends.alone import is_alone, run_alone
from distpad.backends.base import Backend
from distpad.backends.detection import resolve, resolve_step
from distpad.backends.elastic import ElasticState
from distpad.backends.finite import check_finite
from distpad.backends.fit_checks import enable as enable_keras_fit
from distpad.backends.horovod import HorovodBackend
from distpad.backends.local import LocalBackend
from distpad.backends.start import start
from distpad.backends.strategy import StrategyBackend
from distpad.backends.variables import check_alike, tensorflow_variable

__all__ = [
    "Backend",
    "ElasticState",
    "HorovodBackend",
    "LocalBackend",
    "StrategyBackend",
    "check_alike",
    "check_finite",
    "enable_keras_fit",
    "is_alone",
    "resolve",
    "resolve_step",
    "run_alone",
    "start",
    "tensorflow_variable",
]
