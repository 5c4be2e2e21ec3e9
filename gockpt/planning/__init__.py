"""Arithmetic over sizes and measured rates: the window of a save, and the interval between saves."""
