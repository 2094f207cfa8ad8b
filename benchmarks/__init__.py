"""Side by side with what a user would pick instead: every figure from one run on one machine."""
