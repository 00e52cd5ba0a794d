"""Certified lower bounds of distributional accuracy: of the network itself, or of a randomised one."""

from wdat.certify.base import Certificate, Certified, Surroundings
from wdat.certify.radii import Crown, Radii
from wdat.certify.smoothing import Randomised, Smoothing

__all__ = ["Certificate", "Certified", "Crown", "Radii", "Randomised", "Smoothing", "Surroundings"]
