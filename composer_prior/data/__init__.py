"""Captions, streams, batches, images, tokenizers, MDS, files and remotes."""
