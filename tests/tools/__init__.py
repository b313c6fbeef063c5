"""Programs around the tests: the demo, rendering, nbval."""
