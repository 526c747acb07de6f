"""Losses; those of one image or token leave the mean over valid images to tasks."""
