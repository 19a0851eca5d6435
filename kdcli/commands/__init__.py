"""What each command takes and says; the work is done by the modules they import when it starts."""
