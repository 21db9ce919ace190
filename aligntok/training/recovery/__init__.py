"""What keeps a run alive: checkpoints, the guard against values that are not finite, loss spikes."""
