"""Build entry point. Everything declarative is in pyproject.toml; compiled parts are listed here.

It never imports torch: metadata must be producible in an isolated build environment without it.
"""

from setuptools import setup

setup(ext_modules=[])
