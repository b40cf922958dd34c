"""The public Python API: a VM that you can hold."""
