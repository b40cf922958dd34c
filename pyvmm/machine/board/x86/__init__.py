"""The x86 machine: a PC without a past, whose devices ACPI describes."""
