"""certify: compare the gradients of random steps on all replicas with those of one device."""

from distpad.certification.certificate import Certificate, certify

__all__ = ["Certificate", "certify"]
