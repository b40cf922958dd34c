"""A PC's fixed I/O ports: keyboard controller reset, ACPI power registers, CMOS clock."""
