"""The reference's log-probabilities of captions: computed, stored, carried over to other tokens."""
