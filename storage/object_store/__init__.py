"""Object stores: a client, and uploads."""
