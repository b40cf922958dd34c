"""What a machine is on one architecture, behind one interface, and the registry that chooses."""
