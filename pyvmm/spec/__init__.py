"""The VM as pure data: what can be asked for, and what of it makes sense."""
