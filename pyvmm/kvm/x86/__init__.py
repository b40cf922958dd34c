"""The x86 part of a KVM virtual CPU: registers, CPUID, MSRs, local APIC."""
