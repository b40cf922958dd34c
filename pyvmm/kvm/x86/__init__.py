"""What is x86 about a KVM virtual CPU: registers, CPUID, MSRs, local APIC."""
