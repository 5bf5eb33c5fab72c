"""The engines. Whoever adds one adds one file here; nothing outside this room knows an engine."""

from distpad.backends.base import Backend
from distpad.backends.detection import resolve
from distpad.backends.horovod import HorovodBackend
from distpad.backends.local import LocalBackend
from distpad.backends.start import start
from distpad.backends.strategy import StrategyBackend

__all__ = ["Backend", "HorovodBackend", "LocalBackend", "StrategyBackend", "resolve", "start"]
