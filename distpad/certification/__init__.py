"""Proof on the engine in hand: the gradients of random steps beside those of one device."""

from distpad.certification.certificate import Certificate, certify

__all__ = ["Certificate", "certify"]
