"""What a PC has at fixed I/O ports: keyboard controller reset, ACPI power registers, CMOS clock."""
