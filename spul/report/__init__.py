"""What people look at: the model card."""
