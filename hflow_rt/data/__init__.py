"""Images for training: read from folders and archives, squared, resized, kept as one uint8 array."""
