"""Being here puts tests/ on the import path, so that tests of all folders can share helpers."""
