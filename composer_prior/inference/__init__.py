"""The use of a trained model outside of its run: captions, benchmarks and export."""
