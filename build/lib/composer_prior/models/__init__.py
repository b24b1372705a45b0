"""Large vision-language models: vision towers, projector, language model, and the text-only reference."""
