"""`kd import`: checkpoints of other programs, opened in a process of their own, become checkpoints of kd."""
