"""A run as it lies on disk: its name, its directory, its lock, its progress, and who looks on."""
