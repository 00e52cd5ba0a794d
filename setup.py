"""The packages of a wheel: those of the source, and the folders of configurations; all else is in pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

groups = [f"wdat.conf.{name}" for name in find_namespace_packages("conf")]
data = ["wdat.reporting.templates"]  # no Python in it, and without its name setuptools warns at every installation
setup(packages=[*find_packages(include=["wdat*"]), *data, "wdat.conf", *groups])
