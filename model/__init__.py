"""The model: configuration, Llama forward and backward, LoRA, weights, tokenizer, chat."""
