"""Optimizer updates repeated on the CPU, bit for bit, and the proof that they are."""
