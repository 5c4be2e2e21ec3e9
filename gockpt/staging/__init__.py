"""Copies of one step's bytes from a host's or a device's memory into the arena."""
