"""The background of a save: replay, proof, writing and publishing, by threads or by a process."""
