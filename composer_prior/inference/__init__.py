"""What a trained model is used for outside of its run."""
