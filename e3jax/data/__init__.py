"""Text to fixed token windows, windows to batches, and the offline teacher."""
