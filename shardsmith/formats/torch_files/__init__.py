"""Files of ``torch.save``: read as data, and written around bytes that pass by."""
