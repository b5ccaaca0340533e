"""Pictures: reading them, boxes and views in whole numbers, drawings."""
