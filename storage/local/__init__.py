"""Writing into a local directory: the lock, files, syncs, publication, retention."""
