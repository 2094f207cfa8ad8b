"""What a tensor is: its name, dtype, digest, and where its values come from."""
