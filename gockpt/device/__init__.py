"""The road off a device: tensors in its memory are packed, copied to the arena and proven behind training."""
