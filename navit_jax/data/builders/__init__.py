"""TFDS builders for the sets that this project prepares itself."""
