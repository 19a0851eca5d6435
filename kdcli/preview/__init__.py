"""`--dry-run`: what a run will do, and what it will cost in time and memory, before anything is trained."""
