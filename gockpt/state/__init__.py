"""State of a training run: tensors, optimizer state, random states and extras, and their names."""
