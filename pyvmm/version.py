"""pyvmm's version: apart from the package's public names, which are above all of its layers."""

__version__ = "0.1.0"
