"""What shows a run: its records, trackers, progress, pictures, speed and cost."""
