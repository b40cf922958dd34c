"""The life of one monitor process, from its options to its exit code."""
