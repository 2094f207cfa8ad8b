"""Commands that torchrun has started: who they are among how many."""
