"""All that touches the model."""
