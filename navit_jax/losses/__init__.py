"""Losses an image, or a token: nothing here averages; tasks do, over valid images."""
