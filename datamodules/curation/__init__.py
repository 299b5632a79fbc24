"""What makes data better, without a network."""
