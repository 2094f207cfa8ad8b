"""Trainers' events translated to hooks: one file a trainer, no logic of its own."""
