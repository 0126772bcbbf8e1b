"""Training from scratch: corpus and vocabulary, data order, schedule, the step and the loop around it."""
