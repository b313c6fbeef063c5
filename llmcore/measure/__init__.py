"""What a run will cost, and how good it is."""
