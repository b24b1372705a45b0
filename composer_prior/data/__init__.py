"""What training reads: captions, streams, batches, images, tokenizers, MDS, and where files lie."""
