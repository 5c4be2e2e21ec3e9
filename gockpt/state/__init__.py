"""What a training run holds: tensors, optimizer state, random states and extras, and how each is named."""
