"""What everything stands on: files and weights, processes, devices, and where the program runs."""
