"""The model: configuration, network, processor, checkpoints, price."""
