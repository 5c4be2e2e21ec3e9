"""The engine: everything between a tick and a published checkpoint."""
