"""Reading and verifying checkpoints, from a local directory or an object store."""
