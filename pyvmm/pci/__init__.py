"""PCI as a guest sees it: functions with their configuration space, the bus that they are on, and
MSI-X.

It knows neither KVM nor virtio: `pyvmm.transport.pci` puts a virtio device into a function, and the
machine gives the bus its place and carries MSI-X messages.
"""
