"""What a machine of one architecture is, and which one this is."""
