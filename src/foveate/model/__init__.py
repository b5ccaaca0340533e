"""The model: configuration, network, processor, checkpoints, cost."""
