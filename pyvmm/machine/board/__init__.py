"""The machine of one architecture, behind one interface, and the registry that chooses."""
